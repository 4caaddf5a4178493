"""An event loop in virtual time: when nothing is ready, time jumps to the next timer.

    real loop       ready callbacks ─▶ sleep until a timer or a socket ─▶ …
    this one        ready callbacks ─▶ set the time to the next timer  ─▶ …

There are no sockets, no threads and no signals, so what runs next depends on nothing but what ran
before. The idea is FoundationDB's (Zhou et al., SIGMOD 2021).
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar, cast

from pageframe.core.clock import ManualClock
from pageframe.core.units import NANOSECONDS_PER_SECOND

_START_NS = 1_700_000_000 * NANOSECONDS_PER_SECOND
_Value = TypeVar("_Value")
_process: ContextVar["Process | None"] = ContextVar("process", default=None)


class StuckError(Exception):
    """Nothing is ready, no timer is set, and somebody still waits; or time has run out."""


class Process:
    """What stands for an operating system's process: tasks that die together.

    A task belongs to the process whose task made it.

    Attributes:
        name: For the log.
        is_dead: Whether it was killed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_dead = False
        # A dict, since a set's order would be that of addresses.
        self._tasks: dict[asyncio.Task[Any], None] = {}

    @property
    def context(self) -> Context:
        """A context whose tasks belong to this process."""
        context = copy_context()
        context.run(_process.set, self)
        return context

    def spawn(self, coroutine: Coroutine[Any, Any, _Value]) -> "asyncio.Task[_Value]":
        """Run a coroutine in this process."""
        return asyncio.get_running_loop().create_task(coroutine, context=self.context)

    def kill(self) -> None:
        """Cancel all its tasks. What they still do on their way out reaches nobody."""
        self.is_dead = True
        for task in list(self._tasks):
            task.cancel()

    async def wait_gone(self) -> None:
        """Wait until its last task has unwound."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def own(self, task: "asyncio.Task[Any]") -> None:
        """Take in a new task."""
        self._tasks[task] = None
        task.add_done_callback(self._disown)
        if self.is_dead:
            task.cancel()

    def _disown(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.pop(task, None)


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks in virtual time, which begins at 0.

    Args:
        end_s: Virtual seconds after which everything must be over.
        num_turns_max: Turns of the loop after which everything must be over, so that a circle in
            which no time passes is found, too.

    Attributes:
        num_turns: How often it has looked for ready callbacks.
        problems: What a loop would have logged: exceptions that nobody has caught or asked for.
    """

    def __init__(self, *, end_s: float, num_turns_max: int) -> None:
        super().__init__()
        self._now_s = 0.0
        self._end_s = end_s
        self._num_turns_max = num_turns_max
        self.num_turns = 0
        self.problems: list[str] = []
        self._selector = self
        self.set_exception_handler(_note_problem)
        self.set_task_factory(cast("Any", _make_task))
        # The base class keeps its timers here.
        self._scheduled: list[asyncio.TimerHandle]

    def time(self) -> float:
        """Virtual seconds since the start."""
        return self._now_s

    def select(self, timeout: float | None) -> list[object]:
        """Stand in for a selector: let time pass.

        Raises:
            StuckError: nothing can ever happen again, or it takes too long.
        """
        self.num_turns += 1
        if self.num_turns > self._num_turns_max:
            raise StuckError(f"not over after {self._num_turns_max} turns of the loop")
        if timeout is None:
            raise StuckError(f"nothing will happen any more, at {self._now_s:.6f} s")
        if timeout > 0:
            # Exactly the timer's own time; adding the timeout to the time would be rounded.
            self._now_s = max(self._now_s, self._scheduled[0].when())
            if self._now_s > self._end_s:
                raise StuckError(f"not over after {self._end_s:g} s of virtual time")
        return []

    def extend(self) -> None:
        """Allow as much again, for cleaning up."""
        self._end_s += self._now_s
        self._num_turns_max += self.num_turns

    def close(self) -> None:
        """Close it."""
        self._scheduled.clear()
        super().close()

    def _process_events(self, event_list: list[object]) -> None:
        """There are no sockets."""

    def _write_to_self(self) -> None:
        """Nothing sleeps, so nothing has to be woken."""


def run_virtually(
    main: Callable[[], Coroutine[Any, Any, _Value]], *, end_s: float, num_turns_max: int
) -> tuple[_Value, list[str]]:
    """Run a coroutine in a virtual loop of its own.

    Returns:
        What it returns; and tasks that it left behind, and exceptions that nobody caught.

    Raises:
        StuckError: it never ends.
    """
    loop = VirtualLoop(end_s=end_s, num_turns_max=num_turns_max)
    try:
        result = loop.run_until_complete(main())
        left = sorted(f"left behind: {task.get_coro()}" for task in asyncio.all_tasks(loop))
        loop.run_until_complete(loop.shutdown_asyncgens())
        return result, left + loop.problems
    finally:
        _unwind(loop)
        loop.close()


def _note_problem(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    assert isinstance(loop, VirtualLoop), "it handles no other loop's"
    loop.problems.append(f"{context.get('message')}: {context.get('exception')!r}")


def _unwind(loop: VirtualLoop) -> None:
    """Let what is left run to its end, so that it is not found in pieces later."""
    loop.extend()
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        with contextlib.suppress(StuckError):
            loop.run_until_complete(asyncio.wait(left))


class VirtualClock(ManualClock):
    """Wall time as a process of the simulation sees it.

    ``advance_ns`` moves it ahead of the loop, for work that takes time without awaiting; whoever
    drives that work sleeps until the loop has caught up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._ahead_ns = 0

    def now_ns(self) -> int:
        """Nanoseconds since the Unix epoch."""
        return _START_NS + round(self._loop.time() * NANOSECONDS_PER_SECOND) + self._ahead_ns

    def advance_ns(self, delta_ns: int) -> None:
        """Be ahead by ``delta_ns`` more."""
        assert delta_ns >= 0, f"a clock does not run back: {delta_ns} ns"
        self._ahead_ns += delta_ns

    async def catch_up(self) -> None:
        """Let the time pass by which this clock is ahead."""
        if self._ahead_ns:
            end_s = self._loop.time() + self._ahead_ns / NANOSECONDS_PER_SECOND
            self._ahead_ns = 0
            await wait_until(end_s)


async def wait_until(when_s: float) -> None:
    """Wait until a point of the running loop's time."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    timer = loop.call_at(when_s, _succeed, future)
    try:
        await future
    finally:
        timer.cancel()


def _succeed(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _make_task(
    loop: asyncio.AbstractEventLoop,
    coroutine: Coroutine[Any, Any, Any],
    context: Context | None = None,
    **options: Any,
) -> "asyncio.Task[Any]":
    task = asyncio.Task(coroutine, loop=loop, context=context, **options)
    process = (context or copy_context()).get(_process)
    if process is not None:
        process.own(task)
    return task
