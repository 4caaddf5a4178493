"""What waits to leave on a stream that carries many generations: all of it goes as one message.

    generation 1 ──put──▶┐
    generation 2 ──put──▶├──▶ parts ──▶ writer ──▶ one message
    generation n ──put──▶┘

One event from the scheduler wakes the generations of a whole batch, and they run in one turn of
the event loop. The first that puts wakes the writer, so the writer runs behind the last of them:
nothing waits for a timer, and 64 tokens are one write.

While it is under way nobody has a turn, and then for as long again as the message took from its
first part on, 10 ms at most; what comes in the meantime gathers in the mailboxes and is merged
there. So at most half of the time goes into writing, as with ``WriteTurns``, and the load itself
sets the size of a message. With steps that take longer than that nobody ever waits.
"""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

Part = TypeVar("Part")

# A caller that reads slowly makes a write long, and that is no work; 64 streams need less.
_REST_S_MAX = 0.01


class Outbox(Generic[Part]):
    """Parts in, messages out. For one writer, on one event loop; gives ``Turns``."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._filled = asyncio.Event()
        self._is_written = asyncio.Event()
        self._is_written.set()
        self._has_rested = asyncio.Event()
        self._has_rested.set()
        self._is_closed = False
        self._since_s = 0.0

    def put(self, part: Part) -> None:
        """Add a part to the next message; behind the close it is nobody's."""
        if self._is_closed:
            return
        if not self._parts:
            self._since_s = asyncio.get_running_loop().time()
            self._filled.set()
        self._parts.append(part)

    def close(self) -> None:
        """End the writing, behind what is there."""
        self._is_closed = True
        self._filled.set()

    async def written(self) -> None:
        """Wait until no write is under way: the caller reads."""
        await self._is_written.wait()

    async def write_all(self, write: Callable[[list[Part]], Awaitable[None]]) -> None:
        """Write all that is there whenever there is something; return behind the close.

        Args:
            write: Writes parts, at least one, in their order.
        """
        loop = asyncio.get_running_loop()
        rest = loop.call_soon(self._has_rested.set)
        while self._parts or not self._is_closed:
            await self._filled.wait()
            self._filled.clear()
            if self._parts:
                parts, self._parts = self._parts, []
                since_s = self._since_s
                rest.cancel()
                self._is_written.clear()
                self._has_rested.clear()
                await write(parts)
                self._is_written.set()
                rest_s = min(loop.time() - since_s, _REST_S_MAX)
                rest = loop.call_later(rest_s, self._has_rested.set)

    def turn(self) -> Self:
        """A turn at taking what has gathered."""
        return self

    async def __aenter__(self) -> None:
        """Wait for the turn."""
        while not self._has_rested.is_set():
            await self._has_rested.wait()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing is held."""
