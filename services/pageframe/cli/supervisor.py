"""Keeps services running together: all start at once, all drain in order, none is left behind.

    start all ─▶ every one ready ─▶ on_ready ─▶ run ─▶ first signal ─▶ drain in order ─▶ 0
        │ one fails                      │ one dies: restart with back-off ─▶ too often ─▶ 1
        ▼                                ▼
    its message and exit code        second signal ─▶ kill all ─▶ 130

The death of a service is a stall for the others, not an error: they connect again by themselves.
"""

import asyncio
import contextlib
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from pageframe.cli.child import Child, ChildFailedError, ReadyReport, ServiceSpec
from pageframe.cli.console import Console
from pageframe.cli.exit_codes import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_REPLACED,
)
from pageframe.cli.service_log import summarise
from pageframe.cli.spawn import Spawned

NUM_RESTARTS_PER_MINUTE_MAX = 8
_BACKOFF_FIRST_SECONDS = 0.1
_BACKOFF_MAX_SECONDS = 5.0
# A service that is still loading has no requests to drain.
_UNREADY_STOP_TIMEOUT_SECONDS = 3.0

NOTHING_STARTED: Mapping[str, Spawned] = MappingProxyType({})

OnReady = Callable[[Mapping[str, ReadyReport]], None]
Summarise = Callable[[str, bytes], str | None]
"""What to show of a line that a service wrote; None for nothing."""


def alarming_line(service: str, line: bytes) -> str | None:
    """Warnings and worse, under the service's name; the log has the rest."""
    summary = summarise(line)
    return f"{service}: {summary}" if summary else None


class Supervisor:
    """Runs services until a signal, or until one of them cannot be kept alive.

    Args:
        specs: In the order in which they drain.
        console: Shows progress, deaths and warnings.
        on_ready: Called once, when every service has been ready.
        backoff_first_seconds: Wait before the first restart of a service within a minute.
        summarise_line: What to show of a line that a service wrote.
        started: Processes of services that were started ahead, by name; used for their first run.
    """

    def __init__(
        self,
        specs: Sequence[ServiceSpec],
        *,
        console: Console,
        on_ready: OnReady,
        backoff_first_seconds: float = _BACKOFF_FIRST_SECONDS,
        summarise_line: Summarise = alarming_line,
        started: Mapping[str, Spawned] = NOTHING_STARTED,
    ) -> None:
        self._specs = specs
        self._console = console
        self._on_ready = on_ready
        self._backoff_first_seconds = backoff_first_seconds
        self._summarise_line = summarise_line
        self._started = dict(started)
        self._children: dict[str, Child] = {}
        self._num_signals = 0
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        """Start, keep and drain all services; returns the exit code of the command."""
        with self._signals():
            keepers: list[asyncio.Task[None]] = []
            try:
                for spec in self._specs:
                    self._start(spec)
                ready = asyncio.create_task(self._all_ready())
                keepers = [asyncio.create_task(self._keep(spec)) for spec in self._specs]
                exit_code = await self._until_stop(ready, keepers)
            except OSError as error:
                self._console.say(f"cannot start a service: {error}")
                exit_code = EXIT_FAILURE
            finally:
                for keeper in keepers:
                    keeper.cancel()
                await asyncio.gather(*keepers, return_exceptions=True)
                await self._drain()
        return EXIT_INTERRUPTED if self._hurry.is_set() else exit_code

    async def _until_stop(
        self, ready: "asyncio.Task[None]", keepers: "list[asyncio.Task[None]]"
    ) -> int:
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await _first_of([ready, stopped, *keepers])
            if ready.done() and not ready.cancelled() and ready.exception() is None:
                await _first_of([stopped, *keepers])
                failed = _failure_of(keepers)
                return EXIT_OK if failed is None else self._report(failed)
            failed = _failure_of([ready, *keepers])
            return EXIT_INTERRUPTED if failed is None else self._report(failed)
        finally:
            for task in (stopped, ready):
                task.cancel()
            await asyncio.gather(stopped, ready, return_exceptions=True)

    def _report(self, failed: ChildFailedError) -> int:
        self._console.say(failed.message)
        return failed.exit_code

    async def _all_ready(self) -> None:
        # Shielded: giving up waiting must not cancel what a child may still report.
        waits = [asyncio.shield(child.ready) for child in self._children.values()]
        reports = await asyncio.gather(*waits)
        self._on_ready(dict(zip(self._children, reports, strict=True)))

    def _start(self, spec: ServiceSpec) -> Child:
        def on_progress(message: str, fraction: float | None) -> None:
            self._console.progress(spec.name, message, fraction)

        def on_line(line: bytes) -> None:
            if summary := self._summarise_line(spec.name, line):
                self._console.say(summary)

        def on_child_ready(report: "asyncio.Future[ReadyReport]") -> None:
            if not report.cancelled() and report.exception() is None:
                self._console.progress(spec.name, "ready", 1.0)

        self._console.progress(spec.name, "starting")
        child = Child.start(spec, on_progress, on_line, self._started.pop(spec.name, None))
        child.ready.add_done_callback(on_child_ready)
        self._children[spec.name] = child
        return child

    async def _keep(self, spec: ServiceSpec) -> None:
        """Restart one service whenever it ends.

        Raises:
            ChildFailedError: if it failed before it was ever ready, dies too often, or was replaced
                by another one, which it would only drive out if it came back.
        """
        loop = asyncio.get_running_loop()
        deaths: deque[float] = deque()
        child = self._children[spec.name]
        await asyncio.shield(child.ready)
        while True:
            status = await asyncio.shield(child.exited)
            if status == EXIT_REPLACED:
                message = f"another {spec.name} serves in the place of this one; see"
                raise ChildFailedError(f"{message} {spec.log_path}", EXIT_REPLACED)
            deaths.append(loop.time())
            while deaths[0] < loop.time() - 60.0:
                deaths.popleft()
            if len(deaths) > NUM_RESTARTS_PER_MINUTE_MAX:
                message = f"{spec.name} died {len(deaths)} times in a minute; see {spec.log_path}"
                raise ChildFailedError(message, EXIT_FAILURE)
            wait_seconds = min(
                self._backoff_first_seconds * 2 ** (len(deaths) - 1), _BACKOFF_MAX_SECONDS
            )
            self._console.say(f"{spec.name} {_how(status)}; restarting in {wait_seconds:g} s")
            await asyncio.sleep(wait_seconds)
            child = self._start(spec)

    async def _drain(self) -> None:
        for spec in self._specs:
            child = self._children.get(spec.name)
            if child is None:
                continue
            ready = child.ready.done() and child.ready.exception() is None
            timeout_seconds = (
                spec.stop_timeout_seconds
                if ready
                else min(spec.stop_timeout_seconds, _UNREADY_STOP_TIMEOUT_SECONDS)
            )
            await self._stop_child(child, timeout_seconds)

    async def _stop_child(self, child: Child, timeout_seconds: float) -> None:
        if not self._hurry.is_set():
            child.send_signal(signal.SIGTERM)
            hurried = asyncio.create_task(self._hurry.wait())
            await asyncio.wait(
                [child.exited, hurried],
                timeout=timeout_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            hurried.cancel()
            await asyncio.gather(hurried, return_exceptions=True)
            if not child.exited.done():
                self._console.say(f"{child.spec.name} did not stop in time; killing it")
        if not child.exited.done():
            child.kill_group()
        await child.exited

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._take_signal)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _take_signal(self) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            self._console.say("draining; press Ctrl-C again to stop at once")
            self._stop.set()
        else:
            self._hurry.set()


async def _first_of(tasks: "Sequence[asyncio.Task[None] | asyncio.Task[bool]]") -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _failure_of(tasks: "Sequence[asyncio.Task[None]]") -> ChildFailedError | None:
    for task in tasks:
        error = task.exception() if task.done() and not task.cancelled() else None
        if isinstance(error, ChildFailedError):
            return error
        if error is not None:
            raise error
    return None


def _how(status: int) -> str:
    return f"was ended by signal {-status}" if status < 0 else f"ended with exit code {status}"
