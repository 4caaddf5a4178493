"""What waits to leave on a stream that carries many generations: all of it goes as one message.

    generation 1 ──wake──▶┐
    generation 2 ──wake──▶├──▶ writer: gather, one part of each ──▶ one message
    generation n ──wake──▶┘

One event from the scheduler fills the mailboxes of a whole batch, and the first that is filled
wakes the writer, which runs behind the last: it takes from all of them in one pass, without a task
or a turn of the event loop for each. Nothing waits for a timer, and 64 tokens are one write.

While it is under way nothing is taken, and then for as long again as the message took from its
first part on, 10 ms at most; what comes in the meantime gathers in the mailboxes and is merged
there. So at most half of the time goes into writing, as with ``WriteTurns``, and the load itself
sets the size of a message. With steps that take longer than that nothing ever waits, and no timer
runs either: only what comes within the rest has one set.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Part = TypeVar("Part")

# A caller that reads slowly makes a write long, and that is no work; 64 streams need less.
_REST_S_MAX = 0.01


class Outbox(Generic[Part]):
    """Parts in, messages out. For one writer, on one event loop."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._woken = asyncio.Event()
        self._is_written = asyncio.Event()
        self._is_written.set()
        self._is_closed = False
        self._is_gathering = False

    def put(self, part: Part) -> None:
        """Add a part to the next message; behind the close it is nobody's."""
        if not self._is_closed:
            self._parts.append(part)
            # What is gathered leaves at once: it must not wake the writer for another pass.
            if not self._is_gathering:
                self._woken.set()

    def wake(self) -> None:
        """There is something to gather."""
        self._woken.set()

    def close(self) -> None:
        """End the writing, behind what is there; nothing is gathered any more."""
        self._is_closed = True
        self._woken.set()

    async def written(self) -> None:
        """Wait until no write is under way: the caller reads."""
        await self._is_written.wait()

    async def write_all(
        self, write: Callable[[list[Part]], Awaitable[None]], gather: Callable[[], None]
    ) -> None:
        """Write all that is there whenever there is something; return behind the close.

        Args:
            write: Writes parts, at least one, in their order.
            gather: Puts what there is to gather.
        """
        loop = asyncio.get_running_loop()
        rested_s = loop.time()
        while self._parts or not self._is_closed:
            await self._woken.wait()
            since_s = loop.time()
            if since_s < rested_s:
                await asyncio.sleep(rested_s - since_s)
                since_s = loop.time()
            self._woken.clear()
            self._is_gathering = True
            gather()
            self._is_gathering = False
            if self._parts:
                parts, self._parts = self._parts, []
                self._is_written.clear()
                await write(parts)
                self._is_written.set()
                written_s = loop.time()
                rested_s = written_s + min(written_s - since_s, _REST_S_MAX)
