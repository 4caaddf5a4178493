"""The step thread's work without a thread: a task of the loop, and steps that last virtual time.

The engine computes a step in an instant and moves its clock ahead by what the step costs; the task
then sleeps until the loop has caught up, and only then hands the result over. Nobody else touches
the engine meanwhile, so it makes no difference that its state changed at the beginning.
"""

import asyncio
import queue
from collections import deque
from collections.abc import Callable

from pageframe.core.plan import StepPlan
from pageframe.core.step import StepResult
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.executor.driven import Engine
from pageframe.executor.step_thread import Session, StepThread
from pageframe.lab.simulation.virtual_time import VirtualClock

_Command = Callable[[], None]


class VirtualSteps(StepThread):
    """Runs an engine in virtual time.

    Args:
        loop: The virtual loop.
        clock: Of this executor; its engine moves it ahead.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: VirtualClock) -> None:
        super().__init__(loop, clock)
        self._virtual_clock = clock
        self._commands = _Inbox()
        self._inbox = self._commands
        self._task: asyncio.Task[None] | None = None
        self._ended_step: tuple[Session, StepResult] | None = None

    async def start(self, build: Callable[[], Engine]) -> None:
        """Build the engine, and begin to work."""
        self._engine = build()
        self._engine.on_launch = self._hand_over
        self._is_built = True
        self._task = asyncio.get_running_loop().create_task(self._drive())

    async def stop(self) -> None:
        """End after the commands posted so far."""
        self._inbox.put(None)
        assert self._task is not None, "start comes first"
        await self._task

    async def _drive(self) -> None:
        while True:
            command = await self._wait_command()
            if command is None:
                return
            command()
            await self._virtual_clock.catch_up()
            if self._ended_step is not None:
                session, result = self._ended_step
                self._ended_step = None
                self._end_step(session, result)
            if self._on_change is not None:
                self._on_change()

    async def _wait_command(self) -> _Command | None:
        if self._inbox.empty():
            self._hand_over()
            self._check_at_rest()
        while self._inbox.empty():
            due_s = self._seconds_until_due()
            if not await self._commands.wait(due_s):
                return self._pass_time
        return self._inbox.get_nowait()

    def _step(self, session: Session, plan: StepPlan) -> None:
        if not session.is_open:
            return
        self._cancel(session)
        self._pass_time()
        self._ended_step = (session, self._engine.step(plan))

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon(function, *arguments)


class _Inbox(queue.SimpleQueue[_Command | None]):
    """Commands, and a task of the same loop that waits for them."""

    def __init__(self) -> None:
        self._commands: deque[_Command | None] = deque()
        self._filled: asyncio.Future[None] | None = None

    def put(self, item: _Command | None, block: bool = True, timeout: float | None = None) -> None:
        """Add a command."""
        self._commands.append(item)
        if self._filled is not None and not self._filled.done():
            self._filled.set_result(None)

    def get_nowait(self) -> _Command | None:
        """Take the oldest command."""
        return self._commands.popleft()

    def empty(self) -> bool:
        """Whether there is none."""
        return not self._commands

    async def wait(self, timeout_s: float | None) -> bool:
        """Wait for a command; False when there was none for ``timeout_s``."""
        loop = asyncio.get_running_loop()
        self._filled = filled = loop.create_future()
        timer = None
        if timeout_s is not None:
            # Never earlier than due, or rounding would make a circle.
            timer = loop.call_later(timeout_s + 1 / NANOSECONDS_PER_SECOND, _wake, filled)
        try:
            await filled
        finally:
            self._filled = None
            if timer is not None:
                timer.cancel()
        return bool(self._commands)


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
