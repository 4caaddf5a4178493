"""Lines that a child writes into a pipe, taken together where there is no hurry.

A process that is woken by every line of a busy one takes a core from it each time. With a pause
between two reads it is woken some times a second at most, and the child's writes wake nobody.
"""

import asyncio
import contextlib
import fcntl
from collections.abc import Callable
from typing import IO

LINE_BYTES_MAX = 1 << 20
_PIPE_BYTES = 1 << 20
_HURRY_BYTES = 1 << 14

TakeLines = Callable[[list[bytes]], None]


async def read_lines(stream: IO[bytes], take: TakeLines, *, pause_seconds: float = 0.0) -> None:
    """Hand over all lines of a pipe, until its end; each with the newline that ends it.

    Args:
        stream: The pipe's end; it is closed at last.
        take: Gets one or more lines at a time. A line of more than ``LINE_BYTES_MAX`` bytes comes
            in pieces, and the last one may lack its newline.
        pause_seconds: How long after a read the next one waits, unless so much was there that
            whoever writes might soon have to wait.

    Raises:
        Exception: what ``take`` raises; nothing is read after it.
    """
    if pause_seconds:
        # Not everywhere, and not for everybody: else who writes much may have to wait for a read.
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    loop = asyncio.get_running_loop()
    transport, lines = await loop.connect_read_pipe(lambda: _Lines(take, pause_seconds), stream)
    try:
        await lines.ended
    finally:
        transport.close()


class _Lines(asyncio.Protocol):
    def __init__(self, take: TakeLines, pause_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._take = take
        self._pause_seconds = pause_seconds
        self._rest = b""
        self._transport: asyncio.ReadTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.ReadTransport), "it is the end to read from"
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines:
            self._hand_over([line + b"\n" for line in lines])
        if len(self._rest) > LINE_BYTES_MAX:
            self._hand_over([self._rest])
            self._rest = b""
        if self._pause_seconds and len(data) < _HURRY_BYTES:
            self._transport.pause_reading()
            self._loop.call_later(self._pause_seconds, self._resume)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._rest:
            self._hand_over([self._rest])
        if not self.ended.done():
            self.ended.set_result(None)

    def _resume(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _hand_over(self, lines: list[bytes]) -> None:
        if self.ended.done():
            return
        try:
            self._take(lines)
        except Exception as error:
            self.ended.set_exception(error)
