"""`pageframe pool` before several replicas: a list with totals, or one that is named."""

import asyncio
import contextlib
import io
import json
import os

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pageframe.cli.commands import build_app
from pageframe.cli.executor_address import choose_executor, find_executors
from pageframe.cli.pool_replicas import render_pools, run_pools_live
from pageframe.config.launch import Launch
from pageframe.config.settings import Settings
from pageframe.core.errors import NotFoundError, PreconditionError
from pageframe.core.replica import PoolAccount
from pageframe.wire.memory_facts import ReplicaPool
from unit.executor.memory_house import memory_house

BOTH = {"executor": "unix:/run/executor.sock", "10.0.0.2:50053": "10.0.0.2:50053"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a scenario before two houses; the first is named `one/executor`, the other is away."""
    addresses = [f"unix:{tmp_path}/one/executor.sock", f"unix:{tmp_path}/two/executor.sock"]
    monkeypatch.setenv("PAGEFRAME_STATE_DIR", str(tmp_path / "state"))
    write_launch(tmp_path / "state", executor_at=",".join(addresses))

    async def pool(*arguments):
        runner = CliRunner(env={"COLUMNS": "300"})
        return await asyncio.to_thread(runner.invoke, build_app("pool"), ["pool", *arguments])

    def run(scenario, num_houses=2):
        async def main():
            async with contextlib.AsyncExitStack() as stack:
                houses = []
                for name in ("one", "two")[:num_houses]:
                    (tmp_path / name).mkdir()
                    houses.append(await stack.enter_async_context(memory_house(tmp_path / name)))
                await scenario(pool, *houses)

        asyncio.run(main())

    return run


def write_launch(state_dir, **fields):
    folder = state_dir / "run" / "1"
    folder.mkdir(parents=True)
    settings = Settings(state_dir=state_dir, replicas=fields.pop("replicas", 1))
    launch = Launch(
        settings=settings,
        model_path=state_dir,
        run_dir=folder,
        num_threads=1,
        supervisor_pid=os.getpid(),
        **fields,
    )
    launch.write(folder / "launch.json")


def test_replicas_of_one_run_are_found_by_their_sockets(tmp_path):
    write_launch(tmp_path, replicas=3)
    folder = tmp_path / "run" / "1"
    assert find_executors(None, tmp_path, {}) == {
        name: f"unix:{folder / name}.sock" for name in ("executor", "executor-1", "executor-2")
    }


@pytest.mark.parametrize(
    ("executors", "replica", "address"),
    [
        ({"executor": "unix:/x"}, "", "unix:/x"),
        (BOTH, "executor", "unix:/run/executor.sock"),
        (BOTH, "unix:/run/executor.sock", "unix:/run/executor.sock"),
        (BOTH, "10.0.0.2:50053", "10.0.0.2:50053"),
    ],
)
def test_a_replica_is_named_by_name_or_address(executors, replica, address):
    assert choose_executor(executors, replica) == address


def test_who_could_be_meant_is_said():
    with pytest.raises(PreconditionError) as caught:
        choose_executor(BOTH, "")
    assert (caught.value.reason, "executor, 10.0.0.2:50053" in caught.value.message) == (
        "REPLICA_MISSING",
        True,
    )
    with pytest.raises(NotFoundError) as caught:
        choose_executor(BOTH, "executor-7")
    assert "executor-7; there are executor, 10.0.0.2:50053" in caught.value.message


def test_several_are_listed_with_totals(run):
    async def scenario(pool, one, two):
        await one.run(1, 10)
        await two.run(1, 5)
        result = await pool()
        assert result.exit_code == 0, result.output
        rows = [line.split() for line in result.stdout.splitlines()]
        assert rows[0] == [
            "replica",
            "in",
            "use",
            "blocks",
            *["held", "pinned", "cached", "fenced", "free"],
        ]
        assert rows[1][1:] == ["25", "%", "12", "3", "0", "0", "0", "9"]
        assert rows[2][1:] == ["17", "%", "12", "2", "0", "0", "0", "10"]
        assert rows[3] == ["total", "21", "%", "24", "5", "0", "0", "0", "19"]
        told = json.loads((await pool("--json")).stdout)
        assert [it["pool"]["held"] for it in told["replicas"]] == [3, 2]
        assert (told["total"]["total"], told["total"]["held"]) == (24, 5)

    run(scenario)


def test_one_that_is_away_is_said_and_not_counted(run):
    async def scenario(pool, one):
        await one.run(1, 10)
        result = await pool()
        assert result.exit_code == 0, result.output
        rows = result.stdout.splitlines()
        assert rows[2].split()[1:] == ["away"]
        assert rows[3].split() == ["total", "25", "%", "12", "3", "0", "0", "0", "9"]
        assert " is away: " in rows[4]
        told = json.loads((await pool("--json")).stdout)
        assert (told["replicas"][1]["pool"], bool(told["replicas"][1]["away"])) == (None, True)

    run(scenario, num_houses=1)


def test_where_not_one_is_there_it_fails(run):
    async def scenario(pool):
        result = await pool("--once")
        assert (result.exit_code, result.stdout) == (1, "")
        assert "REPLICAS_AWAY" in result.stderr

    run(scenario, num_houses=0)


def test_one_is_shown_whole_and_only_what_is_named_is_changed(run, tmp_path):
    async def scenario(pool, one, two):
        await two.run(1, 10)
        first, second = (f"unix:{tmp_path}/{it}/executor.sock" for it in ("one", "two"))
        assert "r1" in (await pool("--replica", second)).stdout
        assert "r1" not in (await pool("--replica", first)).stdout
        result = await pool("--resize", "20")
        assert isinstance(result.exception, PreconditionError)
        assert result.exception.reason == "REPLICA_MISSING"
        result = await pool("--resize", "20", "--replica", second)
        assert result.stdout == "the pool has 20 blocks; 0 were moved\n"
        totals = [it.engine.memory.pool.num_blocks for it in (one, two)]
        assert totals == [12, 20]

    run(scenario)


def test_the_list_is_drawn_anew_until_it_is_left():
    looks = [
        [ReplicaPool("executor", PoolAccount(total=4, free=4))],
        [ReplicaPool("executor", None, "it is restarting")],
        [ReplicaPool("executor", PoolAccount(total=4, free=1, held=3))],
    ]

    def read():
        if not looks:
            raise KeyboardInterrupt
        return looks.pop(0)

    console = Console(
        file=io.StringIO(), force_terminal=True, width=90, height=40, color_system=None
    )
    run_pools_live(read, console, interval_s=0.0)
    before, _, after = console.file.getvalue().partition("executor is away: it is restarting")
    assert " 0 %" in before
    assert "75 %" in after


def test_an_empty_pool_is_not_in_use():
    console = Console(file=io.StringIO(), width=90)
    console.print(render_pools([ReplicaPool("executor", PoolAccount())]))
    assert " 0 %" in console.file.getvalue()
