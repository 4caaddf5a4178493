"""A whole Pageframe on this machine: real processes, started and stopped as a person would."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

import grpc
import psutil
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from pageframe.client import GenerationRequest, GenerationResult, PageframeClient
from pageframe.config.launch import Launch
from pageframe.core.errors import ERROR_DOMAIN
from pageframe.rpc.channel import INNER_OPTIONS
from pageframe.telemetry.reader import Span, read_spans
from pageframe.v1 import (
    executor_service_pb2,
    executor_service_pb2_grpc,
    gateway_service_pb2,
    gateway_service_pb2_grpc,
    kv_block_pb2,
    scheduler_service_pb2,
    scheduler_service_pb2_grpc,
)

PAGEFRAME = Path(sys.executable).with_name("pageframe")
PATIENCE_S = 60.0
READY_PREFIX = "pageframe ready grpc="
SERVICES = ("gateway", "scheduler", "executor")
ANSWER_S = 1.0
"""A refusal takes no longer than this; it is given as the deadline of the refused call."""


def environment(**changed: str) -> dict[str, str]:
    """This process's environment, without settings of whoever runs the tests."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PAGEFRAME_", "OTEL_"))
    }
    return kept | {"OMP_NUM_THREADS": "1"} | changed


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds; it is asked again and again, so no wait is longer than it."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)


def error_info(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Status, reason and numbers of a refusal; fails unless it is a rich one of ours."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no details: {error}"
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            assert info.domain == ERROR_DOMAIN
            return error.code(), info.reason, dict(info.metadata)
    raise AssertionError(f"no ErrorInfo: {error}")


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Status, reason and numbers of a call that must be refused."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return error_info(error)
    raise AssertionError(f"not refused: {answer}")


class System:
    """A running ``pageframe up``, by default with the runner that computes nothing.

    Args:
        state_dir: State folder; need not exist.
        model: Folder of the model.
        arguments: Further options.
        variables: Environment variables to set.
    """

    def __init__(
        self, state_dir: Path, model: Path, *arguments: str, runner: str = "sim", **variables: str
    ) -> None:
        self.state_dir = state_dir
        self.model = str(model)
        state_dir.mkdir(parents=True)
        self._stderr = state_dir / "up.stderr"
        command = [str(PAGEFRAME), "up", "--model", self.model, "--runner", runner]
        command += ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--metrics-port", "0"]
        command += ["--state-dir", str(state_dir), *arguments]
        with self._stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=state_dir,
                env=environment(**variables),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._channels: list[grpc.Channel] = []
        try:
            self.address, self.details = self._wait_ready()
            self._started = psutil.Process(self.process.pid).children(recursive=True)
            self.run_dir = self._read_launch().run_dir
            self._connect()
        except BaseException:
            self.kill()
            raise

    @property
    def http_address(self) -> str:
        return self.details["http"]

    def _wait_ready(self) -> tuple[str, dict[str, str]]:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
        line = self.process.stdout.readline() if readable else ""
        assert line.startswith(READY_PREFIX), f"{line!r}\n{self._stderr.read_text()}"
        grpc_address, *details = line.removeprefix(READY_PREFIX).split()
        return grpc_address, dict(detail.split("=", 1) for detail in details)

    def _read_launch(self) -> Launch:
        """The launch file, as the services' own command lines name it."""
        command = self.service("gateway").cmdline()
        return Launch.read(Path(command[command.index("--settings") + 1]))

    def _connect(self) -> None:
        addresses = [
            self.address,
            f"unix:{self.run_dir / 'scheduler.sock'}",
            f"unix:{self.run_dir / 'executor.sock'}",
        ]
        self._channels = [grpc.insecure_channel(it, options=INNER_OPTIONS) for it in addresses]
        self.gateway_channel, self.scheduler_channel, self.executor_channel = self._channels
        self.gateway = gateway_service_pb2_grpc.GatewayServiceStub(self.gateway_channel)
        self.scheduler = scheduler_service_pb2_grpc.SchedulerServiceStub(self.scheduler_channel)
        self.executor = executor_service_pb2_grpc.ExecutorServiceStub(self.executor_channel)

    def client(self, **options: float) -> PageframeClient:
        """A client; a context manager."""
        return PageframeClient(self.address, **options)

    def complete(self, request: GenerationRequest) -> GenerationResult:
        """Run one request that must succeed."""
        with self.client() as client:
            return client.complete(request, timeout_s=PATIENCE_S)

    def generate(
        self, request: gateway_service_pb2.GenerateRequest, timeout_s: float = PATIENCE_S
    ) -> list[gateway_service_pb2.GenerateResponse]:
        """Run a request to its end; all messages."""
        return list(self.gateway.Generate(request, timeout=timeout_s, wait_for_ready=True))

    @contextlib.contextmanager
    def stream(
        self, request: gateway_service_pb2.GenerateRequest
    ) -> Iterator[Iterator[gateway_service_pb2.GenerateResponse]]:
        """Begin a generation; leaving the block closes its stream."""
        call = self.gateway.Generate(request, timeout=PATIENCE_S, wait_for_ready=True)
        try:
            yield call
        finally:
            call.cancel()

    def snapshot(self) -> scheduler_service_pb2.SnapshotResponse:
        """The scheduler's books."""
        return self.scheduler.Snapshot(
            scheduler_service_pb2.SnapshotRequest(), timeout=PATIENCE_S, wait_for_ready=True
        )

    def sequence(self, request_id: str) -> scheduler_service_pb2.SequenceSnapshot | None:
        """The first living sequence of a request, as the scheduler sees it."""
        living = self.snapshot().sequences
        return next((entry for entry in living if entry.request_id == request_id), None)

    def pool(self) -> kv_block_pb2.PoolAccount:
        """The executor's own count of its blocks."""
        described = self.executor.Describe(
            executor_service_pb2.DescribeRequest(), timeout=PATIENCE_S, wait_for_ready=True
        )
        return described.pool

    def is_at_rest(self) -> bool:
        """Whether nothing lives and every block is free or cached, in both sets of books."""
        snapshot = self.snapshot()
        if snapshot.sequences or snapshot.num_steps_in_flight:
            return False
        assert snapshot.num_waiting + snapshot.num_running + snapshot.num_preempted == 0
        return all(
            account.free + account.cached == account.total
            for account in (snapshot.pool, self.pool())
        )

    def settle(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the system is at rest."""
        eventually(self.is_at_rest, "everything has ended and all blocks are back", timeout_s)

    def service(self, name: str) -> psutil.Process:
        """The process of a service that runs now."""
        (found,) = self._running(f"pageframe.{name}")
        return found

    def _running(self, module: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if module in child.cmdline():
                    found.append(child)
        return found

    def kill_service(self, name: str) -> None:
        """SIGKILL a service; the supervisor starts another one."""
        victim = self.service(name)
        victim.kill()
        eventually(lambda: not victim.is_running(), f"{name} is gone")

    def wait_restarted(self, name: str) -> None:
        """Wait until a killed service runs again, and remember its process."""
        eventually(lambda: len(self._running(f"pageframe.{name}")) == 1, f"{name} runs again")
        self._started += psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End as a person would; fails unless it ends well and leaves nothing behind."""
        for name in SERVICES:
            self.wait_restarted(name)
        self.process.send_signal(number)
        self.wait_ended()

    def wait_ended(self) -> None:
        """Wait for a stopping system; fails unless it ends well and leaves nothing behind."""
        assert self.process.wait(PATIENCE_S) == 0, self._stderr.read_text()
        self.wait_gone()
        assert self.errors() == []

    def wait_gone(self) -> None:
        """Wait until no service is left."""
        _, alive = psutil.wait_procs(self._started, timeout=PATIENCE_S)
        assert not alive, f"left behind: {alive}"

    def errors(self) -> list[str]:
        """Lines of the services' logs that speak of a failure."""
        files = sorted((self.state_dir / "logs").glob("*.log"))
        return [line for file in files for line in log_failures(file)]

    def spans(self) -> list[Span]:
        """What was traced; all of it once the system has ended."""
        folder = self.state_dir / "traces"
        return read_spans(folder) if folder.exists() else []

    def kill(self) -> None:
        """Whatever happened, leave nothing running."""
        for channel in self._channels:
            channel.close()
        if self.process.poll() is None:
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            _kill_all(children)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class ClientProcess:
    """A caller in a process of its own, so that it can die. A context manager."""

    PROGRAM = """
import sys, grpc
from pageframe.v1 import gateway_service_pb2, gateway_service_pb2_grpc
channel = grpc.insecure_channel(sys.argv[1], options=[("grpc.enable_http_proxy", 0)])
request = gateway_service_pb2.GenerateRequest.FromString(bytes.fromhex(sys.argv[2]))
for message in gateway_service_pb2_grpc.GatewayServiceStub(channel).Generate(request):
    print(message.WhichOneof("message"), flush=True)
"""

    def __init__(self, address: str, request: gateway_service_pb2.GenerateRequest) -> None:
        arguments = [address, request.SerializeToString().hex()]
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, *arguments],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )

    def read_until(self, kind: str) -> None:
        """Wait for the next message of a kind: header, delta or completion."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == kind:
                return
        raise AssertionError(f"the stream ended without a {kind}")

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


def log_failures(file: Path) -> list[str]:
    """Lines of a log that speak of a failure."""
    lines = file.read_text().splitlines()
    return [f"{file.name}: {line}" for line in lines if _is_failure(line)]


def _is_failure(line: str) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return True
    return entry.get("level") in ("error", "critical")


def _kill_all(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
