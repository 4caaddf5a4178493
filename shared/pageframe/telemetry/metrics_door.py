"""Where a service is asked for its metrics: ``GET /metrics`` on a port of its own.

It runs on the service's event loop and takes nothing while nobody asks: no thread, no timer. All it
can say is one page, so it needs no HTTP library, and the executor loads none.
"""

import asyncio
import contextlib
from collections.abc import Callable

from pageframe.core.errors import PreconditionError

_LOOPBACK = "127.0.0.1"
_HEADER_BYTES_MAX = 16 * 1024
_TIMEOUT_S = 10.0
_NUM_CONNECTIONS_MAX = 16
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsDoor:
    """Serves one page.

    Args:
        port: Where; 0 for nowhere.
        render: Makes the page.
        host: Address of this machine to listen on.
    """

    def __init__(self, port: int, render: Callable[[], bytes], *, host: str = _LOOPBACK) -> None:
        self._host = host
        self._port = port
        self._render = render
        self._server: asyncio.Server | None = None
        self._num_connections = 0

    async def start(self) -> None:
        """Listen from now on.

        Raises:
            PreconditionError: reason ADDRESS_IN_USE.
        """
        if not self._port:
            return
        try:
            self._server = await asyncio.start_server(
                self._serve, self._host, self._port, limit=_HEADER_BYTES_MAX
            )
        except OSError as error:
            raise PreconditionError(
                "ADDRESS_IN_USE",
                f"cannot listen on {self._host}:{self._port} for metrics: it is taken, or not an "
                "address of this machine",
                address=f"{self._host}:{self._port}",
            ) from error

    async def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and close."""
        self._num_connections += 1
        try:
            if self._num_connections > _NUM_CONNECTIONS_MAX:
                return
            async with asyncio.timeout(_TIMEOUT_S):
                header = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(header.partition(b"\r\n")[0]))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # It is no HTTP client, or it has gone: there is nobody to tell.
        finally:
            self._num_connections -= 1
            with contextlib.suppress(OSError):
                writer.close()

    def _answer(self, request_line: bytes) -> bytes:
        method, _, rest = request_line.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if path != b"/metrics":
            return _response("404 Not Found", b"metrics are at /metrics\n")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"ask with GET\n")
        page = self._render()
        return _response("200 OK", page, has_body=method == b"GET")


def _response(status: str, page: bytes, *, has_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: {CONTENT_TYPE}\r\n"
        f"content-length: {len(page)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + (page if has_body else b"")
