"""One direction of one call: messages arrive late, in order, and the sender waits for room.

send ──▶ in flight ──(delay)──▶ arrived ──▶ receive
└──────── at most `window` together ────────┘
"""

import asyncio
from collections import deque
from collections.abc import Callable

import grpc


class PipeBrokenError(grpc.aio.BaseError):
    """The other end is gone. Of the kind that gRPC raises then: nobody takes it for ours."""


class Pipe:
    """Ordered messages with delay and a window.

    Args:
        loop: Tells the time.
        draw_delay: Seconds that the next message takes.
        window: Messages that may be sent and not yet received.
        on_end: Called when the end arrives.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        draw_delay: Callable[[], float],
        window: int,
        on_end: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._draw_delay = draw_delay
        self._window = window
        self._on_end = on_end
        # None is the end.
        self._in_flight: deque[bytes | None] = deque()
        self._arrived: deque[bytes] = deque()
        self._last_arrival_s = 0.0
        self._is_over = False
        self._is_finished = False
        self._changed: list[asyncio.Future[None]] = []

    async def send(self, data: bytes) -> None:
        """Send a message; waits while the window is full.

        Raises:
            PipeBrokenError: the pipe has ended.
        """
        while not self._is_finished and len(self._in_flight) + len(self._arrived) >= self._window:
            await self._wait_changed()
        if self._is_finished:
            raise PipeBrokenError
        self._launch(data)

    async def receive(self) -> bytes | None:
        """The next message; None for the end."""
        while not self._arrived:
            if self._is_over:
                return None
            await self._wait_changed()
        data = self._arrived.popleft()
        self._tell_changed()
        return data

    def finish(self) -> None:
        """End it behind what was sent."""
        if not self._is_finished:
            self._is_finished = True
            self._launch(None)
            self._tell_changed()

    def cut(self, *, keeps_in_flight: bool) -> None:
        """End it from outside; what is in flight arrives now or never."""
        self._is_finished = True
        if not self._is_over:
            if keeps_in_flight:
                self._arrived += (data for data in self._in_flight if data is not None)
            self._in_flight.clear()
            self._end()
        self._tell_changed()

    def _launch(self, data: bytes | None) -> None:
        self._in_flight.append(data)
        at_s = max(self._last_arrival_s, self._loop.time() + self._draw_delay())
        self._last_arrival_s = at_s
        self._loop.call_at(at_s, self._land)

    def _land(self) -> None:
        if not self._in_flight:
            return  # It was cut meanwhile.
        data = self._in_flight.popleft()
        if data is None:
            self._end()
        else:
            self._arrived.append(data)
        self._tell_changed()

    def _end(self) -> None:
        self._is_over = True
        self._on_end()

    async def _wait_changed(self) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        self._changed.append(future)
        await future

    def _tell_changed(self) -> None:
        changed, self._changed = self._changed, []
        for future in changed:
            if not future.done():
                future.set_result(None)
