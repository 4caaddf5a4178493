"""Turns at writing: a few streams at a time, so that reading keeps up.

One event from the scheduler wakes every stream of a batch. If all of them wrote at once, the event
loop would do 64 writes between two reads, and under load each message would carry one token for
ever. With few writes at a time the loop comes back to reading sooner; what it reads gathers in the
mailboxes of those that wait, and goes out as one message. The load itself sets the size.

A place rests for as long as it was used. So at most half of the time goes into writing: with many
streams tokens merge twice as well, and the processes that make them are not starved of a core by
the one that passes them on. A few streams never notice, for there is always a place that rests not.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

_NUM_WRITERS = 4
# A caller that does not read may block its write for ever; others do not wait for it longer.
_TURN_S = 0.005


class WriteTurns:
    """Lets few writers write at a time, first come, first served.

    Args:
        num_writers: How many.
        turn_s: A turn is over after so many seconds, even if its writer is not.
    """

    def __init__(self, num_writers: int = _NUM_WRITERS, turn_s: float = _TURN_S) -> None:
        self._free = asyncio.Semaphore(num_writers)
        self._turn_s = turn_s

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, and have it for the block."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        turn = _Turn(self._free, loop)
        timer = loop.call_later(self._turn_s, turn.end)
        try:
            yield
        finally:
            timer.cancel()
            turn.end()


class _Turn:
    """Gives its place back once, whoever is first to end it, after the place has rested."""

    __slots__ = ("_free", "_is_over", "_loop", "_start_s")

    def __init__(self, free: asyncio.Semaphore, loop: asyncio.AbstractEventLoop) -> None:
        self._free = free
        self._loop = loop
        self._start_s = loop.time()
        self._is_over = False

    def end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._loop.call_later(self._loop.time() - self._start_s, self._free.release)
