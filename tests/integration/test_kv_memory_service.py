"""KV memory's service of a running system: what it tells is true, and what it does holds."""

import contextlib
import itertools
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from integration.system import PAGEFRAME, PATIENCE_S, System, environment, eventually, refusal
from pageframe.client import GenerationRequest, PageframeClient
from pageframe.client.kv_memory import KvMemoryClient
from pageframe.core.errors import NotFoundError, OutOfRangeError, PermissionDeniedError
from pageframe.v1 import kv_memory_service_pb2 as pb
from pageframe.v1.gateway_service_pb2 import GenerateRequest, TokenIds
from pageframe.v1.kv_memory_service_pb2_grpc import KvMemoryServiceStub
from pageframe.v1.sequence_pb2 import SamplingParameters
from pageframe.wire.memory_facts import MemorySnapshot, OperationRecord, TableFacts
from unit.memory.kv_records import KvRecord, ReplayedPool

NUM_BLOCKS = 120
BLOCK_SIZE = 4
POOL = (
    *("--sim-step", "3ms", "--max-num-sequences", "8", "--block-size", str(BLOCK_SIZE)),
    *("--num-blocks", str(NUM_BLOCKS), "--max-model-len", "400", "--token-budget", "64"),
)
PROMPT = list(range(20, 50))
KEYS = "k-red red\nk-blue blue\nk-op ops operator\n"


@pytest.fixture(scope="module")
def system(start: Callable[..., System], sim_model: Path) -> Iterator[System]:
    """Small blocks, so that much happens to them."""
    system = start(sim_model, *POOL)
    yield system
    system.settle()
    system.stop()


@pytest.fixture(scope="module")
def tenants(
    start: Callable[..., System], sim_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    """The same, with keys."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEYS)
    system = start(sim_model, *POOL, "--sim-step", "20ms", "--api-keys", str(keys))
    yield system
    system.stop()


@contextlib.contextmanager
def memory_of(system: System, key: str | None = None) -> Iterator[KvMemoryClient]:
    """A client of the executor."""
    with KvMemoryClient(f"unix:{system.run_dir / 'executor.sock'}", api_key=key) as memory:
        yield memory


def ask(request_id: str, max_tokens: int = 60, prompt: list[int] | None = None) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        token_ids=TokenIds(ids=PROMPT if prompt is None else prompt),
        sampling=SamplingParameters(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
    )


def check_sums(snapshot: MemorySnapshot) -> None:
    """Every number of a snapshot against the others (law 7)."""
    counts = np.bincount(snapshot.states, minlength=5).tolist()
    account = snapshot.account
    assert counts == [
        account.free,
        account.held,
        account.cached,
        account.fenced,
        account.quarantined,
    ]
    assert account.is_conserved
    references = snapshot.pin_counts.copy()
    for table in snapshot.tables:
        np.add.at(references, table.block_ids, 1)
        assert len(set(table.block_ids)) == len(table.block_ids)
        assert table.num_computed <= len(table.block_ids) * snapshot.block_size
    assert references.tolist() == snapshot.ref_counts.tolist()
    assert (snapshot.ref_counts > 0).tolist() == (snapshot.states == 1).tolist()


def replay(operations: list[OperationRecord], num_blocks: int) -> ReplayedPool:
    """The pool as somebody knows it who has only watched."""
    # The first operation is that the pool gets its blocks.
    pool = ReplayedPool(0, num_blocks)
    for number, it in enumerate(operations, 1):
        assert it.number == number
        pool._replay_one(
            KvRecord(
                it.operation,
                it.cause,
                it.sequence_id,
                0,
                0,
                it.step,
                tuple(it.block_ids),
                0,
                tuple(it.target_ids),
            )
        )
    return pool


def operations_up_to(memory: KvMemoryClient, number: int) -> list[OperationRecord]:
    operations: list[OperationRecord] = []
    with memory.watch(1) as batches:
        for batch in batches:
            assert not batch.num_lost
            operations += batch.operations
            if operations[-1].number >= number:
                return [it for it in operations if it.number <= number]
    raise AssertionError("the watch has ended")


def test_whoever_watches_knows_the_pool_exactly(system: System) -> None:
    """All operations replayed give the snapshot, block by block, in the middle of the work."""
    with memory_of(system) as memory, contextlib.ExitStack() as streams:
        for index in range(6):
            prompt = [*PROMPT, index % 3] if index % 2 else PROMPT[: 10 + index]
            next(streams.enter_context(system.stream(ask(f"w{index}", 40 + index, prompt))))
            taken = memory.snapshot()
            check_sums(taken)
            pool = replay(operations_up_to(memory, taken.operation), NUM_BLOCKS)
            assert [int(state) for state in pool.states[:NUM_BLOCKS]] == taken.states.tolist()
            assert pool.references == taken.ref_counts.tolist()
            assert pool.pins == taken.pin_counts.tolist()
            assert pool.is_indexed == taken.is_indexed.tolist()
    system.settle()
    with memory_of(system) as memory:
        taken = memory.snapshot()
        check_sums(taken)
        assert (taken.tables, taken.account.held) == ([], 0)


def decoding_table(memory: KvMemoryClient) -> TableFacts:
    """The table of the only request, once it decodes."""
    found: list[TableFacts] = []

    def look() -> bool:
        found[:] = [it for it in memory.snapshot().tables if it.num_computed > len(PROMPT)]
        return bool(found)

    eventually(look, "a request decodes")
    (table,) = found
    return table


def test_a_table_is_that_of_its_request(slow_system: System) -> None:
    with memory_of(slow_system) as memory, slow_system.stream(ask("mine", 2000)):
        table = decoding_table(memory)
        assert (table.request_id, table.tenant) == ("mine", "default")
        assert table.since_ns > 0
        assert len(table.block_ids) > len(PROMPT) // memory.snapshot().block_size
        block = memory.explain(table.block_ids[0])
        assert block.sequence_ids == [table.sequence_id]
        assert block.operation is not None
        assert 0 < block.operation_number <= memory.snapshot().operation
    slow_system.settle()


def test_what_is_retained_outlives_other_work_and_is_found_again(system: System) -> None:
    prompt = list(range(60, 100))
    with memory_of(system) as memory:
        system.generate(ask("first", 2, prompt))
        kept = memory.retain(prompt, time_to_live_s=600, request_id="keep")
        assert kept.num_tokens == len(prompt)
        assert memory.retain(prompt, time_to_live_s=600, request_id="keep").name == kept.name
        # More than the pool holds goes through it.
        for index in range(4):
            system.generate(ask(f"flood{index}", 10, [index + 1] * 300))
        assert memory.snapshot().account.pinned == len(prompt) // BLOCK_SIZE
        result = system.complete(
            GenerationRequest(
                token_ids=[*prompt, 7], max_tokens=2, temperature=0.0, prefix_handle=kept.name
            )
        )
        assert result.samples[0].account.num_cached_tokens == len(prompt)
        memory.release(kept.name)
        memory.release(kept.name)
        assert memory.snapshot().account.pinned == 0
        with pytest.raises(NotFoundError, match="HANDLE_UNKNOWN"):
            memory.release("nobody's")
    system.settle()


def test_the_pool_changes_its_size_under_running_requests(system: System) -> None:
    """Output is what it is without that."""
    requests = [ask(f"r{index}", 60, PROMPT[: 12 + index]) for index in range(5)]
    expected = [tokens_of(system.generate(request)) for request in requests]
    with memory_of(system) as memory, contextlib.ExitStack() as streams:
        calls = [streams.enter_context(system.stream(request)) for request in requests]
        begun = [[next(call)] for call in calls]
        for num_blocks in (100, 118, 101, NUM_BLOCKS):
            outcome = memory.resize(num_blocks)
            assert outcome.account.total == num_blocks
            check_sums(memory.snapshot())
        heard = [[*first, *call] for first, call in zip(begun, calls, strict=True)]
        assert [tokens_of(messages) for messages in heard] == expected
        for num_blocks, reason in ((0, "RESIZE_TOO_SMALL"), (1 << 31, "RESIZE_ABOVE_RESERVED")):
            stub = KvMemoryServiceStub(system.executor_channel)
            request = pb.ResizeRequest(num_blocks=num_blocks)
            _, found, limits = refusal(lambda: stub.Resize(request, timeout=PATIENCE_S))  # noqa: B023
            assert (found, limits["num_blocks"]) == (reason, str(num_blocks))
    system.settle()


def tokens_of(messages: list[object]) -> list[int]:
    deltas = [it.delta.token_ids for it in messages if it.WhichOneof("message") == "delta"]
    return list(itertools.chain.from_iterable(deltas))


def test_a_watcher_that_never_reads_holds_up_nobody(system: System) -> None:
    stub = KvMemoryServiceStub(system.executor_channel)
    watches = [stub.Watch(pb.WatchRequest(first_operation=1)) for _ in range(3)]
    for watch in watches:
        watch.initial_metadata()
    for index in range(3):
        messages = system.generate(ask(f"n{index}", 30))
        assert len(tokens_of(messages)) == 30
    for watch in watches:
        watch.cancel()
    system.settle()


def test_tenants_see_themselves_and_operators_everybody(tenants: System) -> None:
    metadata = (("authorization", "Bearer k-red"),)
    # Some seconds long, unless it is ended.
    call = tenants.gateway.Generate(ask("reds", 350), metadata=metadata, timeout=PATIENCE_S)
    with memory_of(tenants, "k-red") as red, memory_of(tenants, "k-blue") as blue:
        mine = decoding_table(red)
        assert (mine.request_id, mine.tenant) == ("reds", "red")
        (hidden,) = blue.snapshot().tables
        assert (hidden.request_id, hidden.tenant, hidden.sequence_id) == ("", "", 0)
        assert hidden.block_ids
        assert blue.explain(hidden.block_ids[0]).sequence_ids == []
        assert blue.retain(PROMPT, time_to_live_s=60).num_tokens == 0
        kept = red.retain(PROMPT, time_to_live_s=60)
        assert kept.num_tokens == len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE
        with pytest.raises(NotFoundError, match="HANDLE_UNKNOWN"):
            blue.release(kept.name)
        with pytest.raises(PermissionDeniedError, match="OPERATOR_NEEDED"):
            red.resize(NUM_BLOCKS - 1)
        red.release(kept.name)
    with memory_of(tenants, "k-op") as operator:
        (seen,) = operator.snapshot().tables
        assert (seen.request_id, seen.tenant) == ("reds", "red")
        with pytest.raises(OutOfRangeError, match="BLOCK_UNKNOWN"):
            operator.explain(NUM_BLOCKS)
    call.cancel()


def pool(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(PAGEFRAME), "pool", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_the_command_finds_the_executor_by_the_state_folder(slow_system: System) -> None:
    here = ("--state-dir", str(slow_system.state_dir))
    # Long enough for two starts of the command; leaving the stream ends it.
    with slow_system.stream(ask("seen", 2000)) as outputs:
        next(outputs)
        done = pool(*here)
        assert (done.returncode, done.stderr) == (0, "")
        assert "seen" in done.stdout
        content = json.loads(pool(*here, "--json").stdout)
        assert len(content["blocks"]["state"]) == content["pool"]["total"]
        assert "seen" in [it["request_id"] for it in content["sequences"]]
    slow_system.settle()
    done = pool(*here, "--retain", "the quick brown fox", "--ttl", "1m", "--json")
    assert done.returncode == 0, done.stderr
    handle = json.loads(done.stdout)["handle"]
    assert pool(*here, "--release", handle).stdout == f"{handle} is released\n"
    done = pool(*here, "--block", str(content["pool"]["total"]))
    assert (done.returncode, done.stdout) == (1, "")
    assert "BLOCK_UNKNOWN" in done.stderr


def _listen_to_interrupts() -> None:
    """A shell that runs the tests in the background has its children ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_command_prints_operations_until_it_is_told_to_stop(system: System) -> None:
    # Each of its blocks is allocated, sealed and given up again.
    system.complete(GenerationRequest(token_ids=[5] * 8, max_tokens=300))
    command = [str(PAGEFRAME), "pool", "--watch", "--json", "--from-operation", "1"]
    with subprocess.Popen(
        [*command, "--state-dir", str(system.state_dir)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_listen_to_interrupts,
    ) as process:
        try:
            assert process.stdout is not None
            for number in range(1, 50):
                line = json.loads(process.stdout.readline())
                assert line["number"] == number
                assert line["operation"].startswith("kv.")
                assert bool(line["request_id"]) == bool(line["sequence_id"])
            process.send_signal(signal.SIGINT)
            process.stdout.read()
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_a_system_stops_while_somebody_watches(
    start: Callable[..., System], sim_model: Path
) -> None:
    stopped = start(sim_model, *POOL)
    stub = KvMemoryServiceStub(stopped.executor_channel)
    watch = stub.Watch(pb.WatchRequest())
    watch.initial_metadata()
    with PageframeClient(stopped.address) as client:
        client.complete(GenerationRequest(token_ids=[5], max_tokens=2), timeout_s=PATIENCE_S)
    eventually(stopped.is_at_rest, "it is at rest")
    stopped.stop()
    _, reason, _ = refusal(lambda: list(watch))
    assert reason == "DRAINING"
