"""The pool page before several replicas: any of them can be chosen, linked to, and lost."""

import contextlib
import signal

import pytest

from browser.test_pool_page import LONG, open_page, running_request, wait_for, wait_live
from integration.system import eventually
from integration.test_replicas import find
from pageframe.client.kv_memory import KvMemoryClient

NUM_BLOCKS = 240
NUM_REQUESTS = 6
OPTIONS = "[...document.getElementById('replica').options].map((it) => it.textContent)"
REQUESTS = "[...pageframe.pool.names.values()].map((it) => it.request).sort().join()"


@pytest.fixture(scope="module")
def system(start_system, sim_folder):
    running = start_system(
        sim_folder,
        *("--replicas", "2", "--sim-step", "10ms"),
        *("--num-blocks", str(NUM_BLOCKS), "--block-size", "16"),
    )
    yield running
    for name in ("gateway", "scheduler", "scheduler-1", "executor", "executor-1"):
        eventually(lambda name=name: find(running, name) is not None, f"{name} runs")
    running.process.send_signal(signal.SIGINT)
    running.wait_ended()


@contextlib.contextmanager
def requests_on_both(system):
    """Requests that run while the block does; those of each replica, by the names of replicas."""
    with contextlib.ExitStack() as stack:
        for number in range(NUM_REQUESTS):
            prompt = f"{number} of many; " * 20
            stack.enter_context(
                running_request(
                    system.address, prompt=prompt, request_id=f"request-{number}", **LONG
                )
            )
        found = {}
        for name in ("executor", "executor-1"):
            with KvMemoryClient(f"unix:{system.run_dir}/{name}.sock") as memory:
                found[name] = sorted(it.request_id for it in memory.snapshot().tables)
        assert all(found.values()), f"each replica has some: {found}"
        yield {name: ",".join(requests) for name, requests in found.items()}


def choose(page, replica):
    page.select_option("#replica", replica)
    wait_live(page)


def test_a_replica_is_chosen_and_the_choice_can_be_linked(new_page, system):
    page = open_page(new_page, system)
    wait_live(page)
    page.wait_for_selector("#replica", state="visible")
    assert page.input_value("#replica") == "executor"
    with requests_on_both(system) as requests:
        wait_for(page, f"(those) => {REQUESTS} === those", requests["executor"])
        choose(page, "executor-1")
        wait_for(page, f"(those) => {REQUESTS} === those", requests["executor-1"])
        assert page.url.endswith("/pool?replica=executor-1")
        wait_for(page, f"{OPTIONS}.every((it) => /: [0-9]{{1,2}} % free$/.test(it))")
        sequence, blocks = page.evaluate(
            "() => { const [it] = pageframe.pool.names.keys();"
            " return [it, pageframe.pool.blocksOf(it)]; }"
        )
        told = page.evaluate("(id) => pageframe.feed.explain(id)", blocks[0])
        assert sequence in told["sequence_ids"], "the replica that is shown was asked"
        page.go_back()
        wait_for(page, f"(those) => {REQUESTS} === those", requests["executor"])
        assert page.input_value("#replica") == "executor"
        linked = new_page()
        linked.goto(f"http://{system.http_address}/pool?replica=executor-1")
        wait_for(linked, f"(those) => {REQUESTS} === those", requests["executor-1"])
        wait_for(linked, f"{OPTIONS}.length === 2")
        assert linked.input_value("#replica") == "executor-1"


def test_a_replica_that_goes_away_is_said_and_comes_back(new_page, system):
    page = new_page()
    page.goto(f"http://{system.http_address}/pool?replica=executor-1")
    wait_live(page)
    victim = find(system, "executor-1")
    victim.kill()
    page.wait_for_selector("#state[data-state=away]")
    assert page.evaluate("pageframe.pool.numBlocks") == NUM_BLOCKS, "what it was like stays"
    choose(page, "executor")
    page.select_option("#replica", "executor-1")
    wait_live(page)
    wait_for(page, f"{OPTIONS}.every((it) => it.endsWith(' % free'))")


def test_a_replica_that_nobody_knows_is_said_and_another_can_be_chosen(new_page, system):
    page = new_page(allowed="status of 404")
    page.goto(f"http://{system.http_address}/pool?replica=elsewhere")
    page.wait_for_selector("#state[data-state=away]")
    assert "there are executor, executor-1" in page.inner_text("#state")
    wait_for(page, f"{OPTIONS}.includes('elsewhere: not there')")
    choose(page, "executor-1")
    wait_for(page, f"{OPTIONS}.length === 2")


def test_where_there_is_one_replica_there_is_nothing_to_choose(new_page, start_system, sim_folder):
    alone = start_system(sim_folder, "--num-blocks", "32")
    page = open_page(new_page, alone)
    wait_live(page)
    wait_for(page, "pageframe.replicas.told.length === 1")
    assert page.is_hidden("#replica")
    page.close()
    alone.stop()
