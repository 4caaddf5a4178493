"""Many generations on one stream of one caller, free of any wire.

    orders ──▶ reader ──start──▶ task: check, tokenise, submit ──▶ living ──▶ outbox ──▶ caller
                      ──cancel─▶

A generation has a task until it is submitted. From then on nothing runs for it by itself: its
mailbox tells when it is filled, and the writer has all whose mailboxes are take one step.

Each start has one end, told as its last part: its completions, or a failure. Nothing outlives the
stream: whoever leaves it takes back all that lives on it. A caller that reads nothing is not read
from either, so what waits for it is bounded by what it has asked.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import structlog

from pageframe.core.errors import AlreadyExistsError, CancelledError, InternalError, PageframeError
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.outbox import Outbox
from pageframe.gateway.output import Output
from pageframe.gateway.request import GenerateInput
from pageframe.gateway.running import RunningRequest
from pageframe.telemetry.context import TraceContext

_log = structlog.get_logger(__name__)

_Message = TypeVar("_Message")
Part = TypeVar("Part")

News = Output | PageframeError
"""What there is to tell of one generation; an error is its end."""


class Start(NamedTuple):
    """An order to begin a generation.

    Attributes:
        handle: The caller's number for it.
        read: What is asked; raises PageframeError where that is refused.
        parent: The caller's span, if it told one.
    """

    handle: int
    read: Callable[[], GenerateInput]
    parent: TraceContext | None


class TakeBack(NamedTuple):
    """An order to take a generation back."""

    handle: int


class ManyStream(Generic[Part]):
    """One caller's stream.

    Args:
        service: Does the work.
        encode: Makes a part of what there is to tell of a handle; None if it is not told. A
            PageframeError that it raises ends the generation.
    """

    def __init__(
        self, service: GenerationService, encode: Callable[[int, News], Part | None]
    ) -> None:
        self._service = service
        self._encode = encode
        self._outbox: Outbox[Part] = Outbox()
        self._starting: dict[int, asyncio.Task[None]] = {}
        # Why those are taken back whose tasks are on their way out.
        self._taken_back: dict[int, PageframeError] = {}
        self._living: dict[int, RunningRequest] = {}
        # Of those, the ones that have something to take.
        self._filled: dict[int, RunningRequest] = {}
        self._has_ended = asyncio.Event()
        self._error: Exception | None = None

    async def run(
        self,
        messages: AsyncIterator[_Message],
        read: Callable[[_Message], Iterable[Start | TakeBack]],
        write: Callable[[list[Part]], Awaitable[None]],
    ) -> None:
        """Carry out orders until the caller has no more and the last generation has ended.

        Args:
            messages: What the caller sends.
            read: Makes orders of a message; a PageframeError that it raises ends the stream.
            write: Sends parts, in their order.

        Raises:
            Exception: what ``read`` raised, or the stream was ended with.
        """
        reader = asyncio.create_task(self._read(messages, read))
        watch = self._service.watch(self._give_up)

        async def write_watched(parts: list[Part]) -> None:
            watch.offer()
            await write(parts)
            watch.taken()

        try:
            await self._outbox.write_all(write_watched, self._gather)
            if self._error is not None:
                raise self._error
        finally:
            watch.close()
            tasks = [reader, *self._starting.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for running in self._living.values():
                running.end(asyncio.CancelledError())

    def end(self, error: Exception | None) -> None:
        """End the stream, behind what is ready to be sent, with an error or without."""
        self._error = self._error or error
        self._outbox.close()

    async def _read(
        self,
        messages: AsyncIterator[_Message],
        read: Callable[[_Message], Iterable[Start | TakeBack]],
    ) -> None:
        try:
            async for message in messages:
                await self._outbox.written()
                for order in read(message):
                    self._carry_out(order)
            while self._starting or self._living:
                self._has_ended.clear()
                await self._has_ended.wait()
        except Exception as error:
            # Our bugs too: a stream that nobody reads from any more must not stay open.
            self.end(error)
        else:
            self.end(None)

    def _carry_out(self, order: Start | TakeBack) -> None:
        match order:
            case Start():
                self._start(order)
            case TakeBack(handle):
                self._take_back(handle, _cancelled())

    def _start(self, start: Start) -> None:
        handle = start.handle
        if handle in self._living or self._is_starting(handle):
            self._take_back(handle, _in_use(handle))
            return
        task = self._starting[handle] = asyncio.create_task(self._begin(start))
        task.add_done_callback(partial(self._begun, handle))

    def _is_starting(self, handle: int) -> bool:
        task = self._starting.get(handle)
        return task is not None and not task.done()

    async def _begin(self, start: Start) -> None:
        handle = start.handle
        try:
            running = await self._service.start(start.read(), start.parent)
        except Exception as error:
            self._tell_failure(handle, error)
        else:
            self._living[handle] = running
            running.mailbox.when_filled(partial(self._fill, handle, running))
            self._tell_all(handle, running, lambda: running.opening)

    def _begun(self, handle: int, task: "asyncio.Task[None]") -> None:
        if self._starting.get(handle) is task:
            del self._starting[handle]
        self._has_ended.set()
        error = self._taken_back.pop(handle, None)
        # Told here: a task that is cancelled before its first step never runs.
        if error is not None and task.cancelled():
            self._tell(handle, error)

    def _take_back(self, handle: int, error: PageframeError) -> None:
        """Have a generation end with ``error``; nothing happens if it has ended."""
        if handle in self._living:
            self._end(handle, error)
        elif self._is_starting(handle):
            if handle not in self._taken_back:
                self._starting[handle].cancel()
            self._taken_back[handle] = error

    def _give_up(self, error: PageframeError) -> None:
        """The caller reads nothing: free all places; it hears of it when it reads again."""
        for handle in [*self._starting, *self._living]:
            self._take_back(handle, error)

    def _fill(self, handle: int, running: RunningRequest) -> None:
        if not self._filled:
            self._outbox.wake()
        self._filled[handle] = running

    def _gather(self) -> None:
        filled, self._filled = self._filled, {}
        for handle, running in filled.items():
            if self._living.get(handle) is running:
                self._tell_all(handle, running, running.advance)

    def _tell_all(
        self, handle: int, running: RunningRequest, outputs: Callable[[], Iterable[Output]]
    ) -> None:
        """Tell outputs of a living generation, and end it behind the last or if it fails."""
        try:
            for output in outputs():
                self._tell(handle, output)
        except Exception as error:
            self._end(handle, error)
        else:
            if running.is_done:
                self._end(handle, None)

    def _end(self, handle: int, error: Exception | None) -> None:
        self._living.pop(handle).end(error)
        self._has_ended.set()
        if error is not None:
            self._tell_failure(handle, error)

    def _tell_failure(self, handle: int, error: Exception) -> None:
        if not isinstance(error, PageframeError):
            _log.error("generation_failed", exc_info=error)
            error = InternalError("INTERNAL", "the server failed; its log has the details")
        self._tell(handle, error)

    def _tell(self, handle: int, news: News) -> None:
        part = self._encode(handle, news)
        if part is not None:
            self._outbox.put(part)


def _cancelled() -> PageframeError:
    return CancelledError("CANCELLED", "the generation was taken back by its caller")


def _in_use(handle: int) -> PageframeError:
    return AlreadyExistsError(
        "HANDLE_IN_USE",
        f"handle {handle} was given to a second generation while the first was living; both are "
        "ended",
        handle=handle,
    )
