"""One run of one service process: how it is started, what it reports, how it ends.

    start ─▶ reports on a pipe: progress … ready ─▶ runs ─▶ exits
                             └─ failed ─▶ exits

``spawn`` makes the process; here is who listens to it.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from pageframe.cli.exit_codes import EXIT_BAD_ENVIRONMENT, EXIT_FAILURE
from pageframe.cli.pipe_lines import TakeLines, read_lines
from pageframe.cli.service_log import ServiceLog
from pageframe.cli.spawn import Spawned, spawn

_NUM_LAST_LINES = 5
# How long a line may wait to be shown; nobody who reads along notices.
_LOG_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    """How to run one service.

    Attributes:
        name: Short, as in the log file's name.
        argv: Program and arguments.
        environ: The whole environment.
        log_path: Takes standard output and standard error.
        stop_timeout_seconds: From SIGTERM to SIGKILL.
        reports_ready: Whether it reports when it is ready; one that does not counts as ready.
        death_signal: What the kernel sends it when the supervisor dies.
        unblocks_signals: Whether it begins with SIGINT and SIGTERM blocked, and unblocks them
            itself as soon as it can act on them.
    """

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    log_path: Path
    stop_timeout_seconds: float
    reports_ready: bool = True
    death_signal: signal.Signals = signal.SIGKILL
    unblocks_signals: bool = False


@dataclass(frozen=True, slots=True)
class ReadyReport:
    """Where a service listens, and what the line for people says of it besides, by name."""

    address: str = ""
    details: Mapping[str, str] = field(default_factory=dict)


class ChildFailedError(Exception):
    """A service ended before it was ready.

    Attributes:
        message: Its own words where it had any.
        exit_code: What the supervisor should end with.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


OnProgress = Callable[[str, float | None], None]
OnLine = Callable[[bytes], None]


@dataclass(slots=True)
class Child:
    """A started process. Must be made on the main thread of a running event loop."""

    spec: ServiceSpec
    process: "subprocess.Popen[bytes]"
    on_progress: OnProgress
    on_line: OnLine
    ready: "asyncio.Future[ReadyReport]"
    exited: "asyncio.Task[int]" = field(init=False)
    _failure: ChildFailedError | None = None
    _last_lines: deque[bytes] = field(default_factory=lambda: deque(maxlen=_NUM_LAST_LINES))

    @classmethod
    def start(
        cls,
        spec: ServiceSpec,
        on_progress: OnProgress,
        on_line: OnLine,
        spawned: Spawned | None = None,
    ) -> Self:
        """Start the process, unless it was started ahead, and everything that listens to it.

        Raises:
            OSError: if the program or the log cannot be opened.
        """
        log = ServiceLog(spec.log_path)
        try:
            spawned = spawned or spawn(
                spec.argv,
                spec.environ,
                death_signal=spec.death_signal,
                unblocks_signals=spec.unblocks_signals,
            )
        except BaseException:
            log.close()
            raise
        ready: asyncio.Future[ReadyReport] = asyncio.get_running_loop().create_future()
        # Whoever is not waiting any more need not hear of it.
        ready.add_done_callback(lambda done: done.cancelled() or done.exception())
        child = cls(spec, spawned.process, on_progress, on_line, ready)
        reports = os.fdopen(spawned.reports_fd, "rb")
        child.exited = asyncio.create_task(child._run(reports, log))
        if not spec.reports_ready:
            ready.set_result(ReadyReport())
        return child

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the process; nothing happens when it is gone."""
        if self.process.returncode is None:
            self.process.send_signal(number)

    def kill_group(self) -> None:
        """SIGKILL the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    async def _run(self, reports: IO[bytes], log: ServiceLog) -> int:
        """Listen until the process has ended; the result is its exit status."""
        assert self.process.stdout is not None
        reading = asyncio.create_task(read_lines(reports, self._take_reports))
        logging = asyncio.create_task(
            read_lines(self.process.stdout, self._taker_of(log), pause_seconds=_LOG_PAUSE_SECONDS)
        )
        try:
            status = await asyncio.to_thread(self.process.wait)
            # What it wrote last is still in the pipes. Its own children may hold them open.
            self.kill_group()
            await asyncio.gather(reading, logging)
        finally:
            log.close()
        if not self.ready.done():
            self.ready.set_exception(self._failure or self._unexplained(status))
        return status

    def _take_reports(self, lines: list[bytes]) -> None:
        for line in lines:
            self._take_report(line)

    def _take_report(self, line: bytes) -> None:
        report: dict[str, Any] = json.loads(line)
        if "progress" in report:
            self.on_progress(report["progress"]["message"], report["progress"].get("fraction"))
        elif "ready" in report and not self.ready.done():
            ready = report["ready"]
            self.ready.set_result(ReadyReport(ready["address"], ready["details"]))
        elif "failed" in report:
            failed = report["failed"]
            self._failure = ChildFailedError(failed["message"], int(failed["exit_code"]))

    def _taker_of(self, log: ServiceLog) -> TakeLines:
        def take(lines: list[bytes]) -> None:
            self._last_lines.extend(lines)
            log.write(lines)
            for line in lines:
                self.on_line(line)

        return take

    def _unexplained(self, status: int) -> ChildFailedError:
        if status < 0:
            ended = f"was ended by {signal.Signals(-status).name}"
            if -status == signal.SIGKILL:
                ended += " (out of memory?)"
        else:
            ended = f"ended with exit code {status}"
        last = self._last_lines[-1].decode(errors="replace").strip() if self._last_lines else ""
        message = f"{self.spec.name} {ended} before it was ready; see {self.spec.log_path}"
        known = status == EXIT_BAD_ENVIRONMENT
        return ChildFailedError(
            f"{message}: {last}" if last else message,
            EXIT_BAD_ENVIRONMENT if known else EXIT_FAILURE,
        )
