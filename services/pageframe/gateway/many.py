"""Many generations on one stream of one caller, free of any wire.

    orders ──▶ reader ──start──▶ task of a generation ──put──▶ outbox ──▶ writer ──▶ caller
                      ──cancel─▶

Each start has one end, told as its last part: its completions, or a failure. Nothing outlives the
stream: whoever leaves it takes back all that lives on it. A caller that reads nothing is not read
from either, so what waits for it is bounded by what it has asked.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import structlog

from pageframe.core.errors import AlreadyExistsError, CancelledError, InternalError, PageframeError
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.outbox import Outbox
from pageframe.gateway.output import Output
from pageframe.gateway.request import GenerateInput
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
        self._tasks: dict[int, asyncio.Task[None]] = {}
        # Why those are taken back whose tasks are on their way out.
        self._taken_back: dict[int, PageframeError] = {}
        self._error: Exception | None = None

    async def run(
        self,
        messages: AsyncIterator[_Message],
        read: Callable[[_Message], Start | TakeBack],
        write: Callable[[list[Part]], Awaitable[None]],
    ) -> None:
        """Carry out orders until the caller has no more and the last generation has ended.

        Args:
            messages: What the caller sends.
            read: Makes an order of a message; a PageframeError that it raises ends the stream.
            write: Sends parts, in their order.

        Raises:
            Exception: what ``read`` raised, or the stream was ended with.
        """
        reader = asyncio.create_task(self._read(messages, read))
        try:
            await self._outbox.write_all(write)
            if self._error is not None:
                raise self._error
        finally:
            tasks = [reader, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def end(self, error: Exception | None) -> None:
        """End the stream, behind what is ready to be sent, with an error or without."""
        self._error = self._error or error
        self._outbox.close()

    async def _read(
        self, messages: AsyncIterator[_Message], read: Callable[[_Message], Start | TakeBack]
    ) -> None:
        try:
            async for message in messages:
                await self._outbox.written()
                match read(message):
                    case Start() as start:
                        self._start(start)
                    case TakeBack(handle):
                        self._take_back(handle, _cancelled())
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        except Exception as error:
            # Our bugs too: a stream that nobody reads from any more must not stay open.
            self.end(error)
        else:
            self.end(None)

    def _start(self, start: Start) -> None:
        living = self._tasks.get(start.handle)
        if living is not None and not living.done():
            self._take_back(start.handle, _in_use(start.handle))
            return
        task = asyncio.create_task(self._generate(start))
        self._tasks[start.handle] = task
        task.add_done_callback(partial(self._forget, start.handle))

    def _take_back(self, handle: int, error: PageframeError) -> None:
        """Have a generation end with ``error``; nothing happens if it has ended."""
        task = self._tasks.get(handle)
        if task is None or task.done():
            return
        if handle not in self._taken_back:
            task.cancel()
        self._taken_back[handle] = error

    def _forget(self, handle: int, task: "asyncio.Task[None]") -> None:
        error = self._taken_back.pop(handle, None)
        if self._tasks.get(handle) is task:
            del self._tasks[handle]
        # Told here: a task that is cancelled before its first step never runs.
        if error is not None and task.cancelled():
            self._tell(handle, error)

    async def _generate(self, start: Start) -> None:
        try:
            generation = self._service.generate(start.read(), start.parent, self._outbox)
            async with contextlib.aclosing(generation) as outputs:
                async for output in outputs:
                    self._tell(start.handle, output)
        except PageframeError as error:
            self._tell(start.handle, error)
        except Exception:
            _log.exception("generation_failed")
            message = "the server failed; its log has the details"
            self._tell(start.handle, InternalError("INTERNAL", message))

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
