"""A signal that arrives while a child is being started; real processes."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pageframe.cli import spawn as spawn_module
from pageframe.cli.child import Child, ServiceSpec

# Starts a child that would sleep, and is interrupted before that has become its program.
_INTERRUPTED = """
import asyncio, os, signal, sys
from pathlib import Path
from pageframe.cli import child, spawn
in_child = spawn._in_child

def interrupt(*arguments):
    prepare = in_child(*arguments)
    def run():
        os.kill(os.getppid(), signal.{signal})
        prepare()
    return run

def end(number, frame):
    raise KeyboardInterrupt

async def start():
    signal.signal(signal.{signal}, end)
    spawn._in_child = interrupt
    spec = child.ServiceSpec(
        name="sleeper", argv=("sleep", "60"), environ=dict(os.environ),
        log_path=Path(sys.argv[1]), stop_timeout_seconds=1.0, reports_ready=False,
    )
    try:
        child.Child.start(spec, print, print)
    except KeyboardInterrupt:
        print("interrupted")
    try:
        print("left behind:", os.waitpid(-1, os.WNOHANG))
    except ChildProcessError:
        print("nobody left")

asyncio.run(start())
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_a_child_is_started_leaves_none_behind(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED.format(signal=name), str(tmp_path / "log")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["interrupted", "nobody left"], done.stderr


def start(argv: tuple[str, ...], log_path: Path, lines: list[bytes], **changes) -> Child:
    spec = ServiceSpec(
        name="it",
        argv=argv,
        environ=dict(os.environ),
        log_path=log_path,
        stop_timeout_seconds=1.0,
        reports_ready=False,
        **changes,
    )
    return Child.start(spec, lambda *_: None, lines.append)


def test_a_signal_for_the_child_ends_the_child_and_is_not_taken_for_the_parents(
    tmp_path, monkeypatch
):
    in_child, taken = spawn_module._in_child, []

    def signalled(*arguments):
        prepare = in_child(*arguments)

        def run() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            prepare()

        return run

    monkeypatch.setattr(spawn_module, "_in_child", signalled)

    async def run() -> int:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, taken.append, "SIGTERM")
        try:
            return await start(("sleep", "60"), tmp_path / "log", []).exited
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    assert (asyncio.run(run()), taken) == (-signal.SIGTERM, [])


@pytest.mark.parametrize("unblocks", [False, True])
def test_only_a_child_that_unblocks_signals_begins_with_two_blocked(unblocks, tmp_path):
    lines: list[bytes] = []

    async def run() -> int:
        argv = ("grep", "SigBlk", "/proc/self/status")
        return await start(argv, tmp_path / "log", lines, unblocks_signals=unblocks).exited

    assert asyncio.run(run()) == 0
    two = 1 << (signal.SIGINT - 1) | 1 << (signal.SIGTERM - 1)
    assert [int(line.split()[1], 16) for line in lines] == [two * unblocks]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


# Starts children while gRPC has threads of its own, as tests do and whoever starts services from a
# process that also calls them; `pageframe up` itself does not load gRPC.
_BESIDE_GRPC = """
import asyncio, collections, os
from pageframe.cli.spawn import spawn
import grpc

async def main():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        ends = collections.Counter()
        for _ in range(300):
            spawned = spawn(("true",), dict(os.environ))
            with spawned.process as process, os.fdopen(spawned.reports_fd):
                process.stdout.read()
            ends[process.returncode] += 1
            await asyncio.sleep(0)
    await server.stop(None)
    print(dict(ends))

asyncio.run(main())
"""


def test_a_child_is_not_ended_by_the_grpc_of_its_parent():
    environ = {k: v for k, v in os.environ.items() if k != "GRPC_ENABLE_FORK_SUPPORT"}
    done = subprocess.run(
        [sys.executable, "-c", _BESIDE_GRPC],
        capture_output=True,
        text=True,
        env=environ,
        timeout=60,
    )
    assert done.stdout == "{0: 300}\n", done.stderr


def test_a_child_goes_on_where_nothing_can_be_written_to_its_log():
    lines: list[bytes] = []

    async def run() -> int:
        # More than a pipe holds: it would wait for ever if nobody read on.
        argv = ("sh", "-c", "yes 'a line of some length' | head -c 400000")
        child = start(argv, Path("/dev/full"), lines)
        try:
            return await asyncio.wait_for(asyncio.shield(child.exited), timeout=30)
        finally:
            child.kill_group()

    assert asyncio.run(run()) == 0
    assert sum(map(len, lines)) == 400_000
