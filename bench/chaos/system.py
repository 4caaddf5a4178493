"""A running system whose processes may be killed."""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import psutil

from pageframe.config.launch import Launch
from pageframe.rpc.channel import INNER_OPTIONS
from pageframe.v1 import (
    executor_service_pb2,
    executor_service_pb2_grpc,
    scheduler_service_pb2,
    scheduler_service_pb2_grpc,
)

PATIENCE_S = 120.0


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def eventually(
    condition: Callable[[], bool | Awaitable[bool]], *, every_s: float = 0.01
) -> None:
    """Wait until a condition holds; processes tell nobody when they come and go.

    Raises:
        TimeoutError: it does not for two minutes.
    """
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = condition()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(every_s)


class System:
    """A running ``pageframe up``, whose processes may be killed. A context manager."""

    def __init__(self, state_dir: Path, model: str, runner: str, options: tuple[str, ...]) -> None:
        command = [str(Path(sys.executable).with_name("pageframe")), "up", "--model", model]
        command += [
            "--runner",
            runner,
            "--grpc",
            "127.0.0.1:0",
            "--http",
            "off",
            "--metrics-port",
            "0",
        ]
        command += ["--state-dir", str(state_dir)]
        kept = {name: value for name, value in os.environ.items() if "PAGEFRAME_" not in name}
        state_dir.mkdir(parents=True, exist_ok=True)
        self._stderr = state_dir / "up.stderr"
        with self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [*command, *options],
                cwd=state_dir,
                env=kept | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
        line = self.process.stdout.readline() if readable else ""
        if "grpc=" not in line:
            self.end()
            raise RuntimeError(f"not ready: {line!r}\n{self._stderr.read_text()}")
        self.address = line.partition("grpc=")[2].split()[0]
        command = self.service("gateway").cmdline()
        run_dir = Launch.read(Path(command[command.index("--settings") + 1])).run_dir
        self.scheduler_address = f"unix:{run_dir / 'scheduler.sock'}"
        self.executor_address = f"unix:{run_dir / 'executor.sock'}"

    def service(self, name: str) -> psutil.Process:
        """The process of a service that runs now."""
        found = self.find(name)
        assert found is not None, f"{name} does not run"
        return found

    def find(self, name: str) -> psutil.Process | None:
        """The process of a service, if it runs."""
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if f"pageframe.{name}" in child.cmdline():
                    return child
        return None

    async def wait_service(self, name: str, *, unlike: int = 0) -> psutil.Process:
        """Wait until a service runs, in a process whose id is not ``unlike``."""

        def runs() -> bool:
            self._check_alive()
            found = self.find(name)
            return found is not None and found.pid != unlike

        await eventually(runs)
        return self.service(name)

    def _check_alive(self) -> None:
        if self.process.poll() is not None:
            raise RuntimeError(f"the supervisor has ended\n{self._stderr.read_text()}")

    async def wait_executor(self) -> None:
        """Wait until the executor has loaded its model."""
        channel = grpc.aio.insecure_channel(self.executor_address, options=INNER_OPTIONS)
        async with channel:
            stub = executor_service_pb2_grpc.ExecutorServiceStub(channel)
            await eventually(lambda: _answers(stub))

    async def pool_bytes(self) -> int:
        """What all blocks of the pool take once each was used."""
        async with grpc.aio.insecure_channel(self.executor_address, options=INNER_OPTIONS) as at:
            facts = await executor_service_pb2_grpc.ExecutorServiceStub(at).Describe(
                executor_service_pb2.DescribeRequest(), timeout=PATIENCE_S, wait_for_ready=True
            )
        replica = facts.replica
        return int(replica.num_blocks * replica.block_size * replica.kv_bytes_per_token)

    async def settle(self) -> bool:
        """Wait until the system is at rest; whether it is within two minutes."""
        with contextlib.suppress(TimeoutError):
            await eventually(self.is_at_rest)
            return True
        return False

    async def is_at_rest(self) -> bool:
        """Whether nothing lives and every block is free or cached, in both sets of books."""
        scheduler = grpc.aio.insecure_channel(self.scheduler_address, options=INNER_OPTIONS)
        executor = grpc.aio.insecure_channel(self.executor_address, options=INNER_OPTIONS)
        async with scheduler, executor:
            books = await scheduler_service_pb2_grpc.SchedulerServiceStub(scheduler).Snapshot(
                scheduler_service_pb2.SnapshotRequest(), timeout=PATIENCE_S, wait_for_ready=True
            )
            described = await executor_service_pb2_grpc.ExecutorServiceStub(executor).Describe(
                executor_service_pb2.DescribeRequest(), timeout=PATIENCE_S, wait_for_ready=True
            )
        accounts = (books.pool, described.pool)
        return not (books.sequences or books.num_steps_in_flight) and all(
            account.free + account.cached == account.total for account in accounts
        )

    def __enter__(self) -> "System":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Stop it, and leave nothing behind."""
        children = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


async def _answers(stub: "executor_service_pb2_grpc.ExecutorServiceAsyncStub") -> bool:
    try:
        await stub.Describe(executor_service_pb2.DescribeRequest(), timeout=1.0)
    except grpc.RpcError:
        return False
    return True
