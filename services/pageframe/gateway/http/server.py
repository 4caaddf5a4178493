"""The HTTP server: uvicorn on the gateway's own event loop, with our bounds and our way to end.

A connection is closed when it takes too long to send a header, when its caller does not read for
too long, and when it has been idle; a header has a greatest size, and so has a body (``body``).
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from pageframe.config.values import parse_host_port
from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.core.limits import LIMITS
from pageframe.gateway.http.errors import ErrorForm
from pageframe.gateway.http.exchange import encode_json
from pageframe.rpc.listening import warn_of_plain_text
from pageframe.rpc.tls import ServerTls
from pageframe.rpc.tls_serving import server_context

# From the first byte of a connection, or of its next request, to the end of the header.
HEADER_TIMEOUT_S = 30.0
# A caller may take so long to make room for more output.
WRITE_TIMEOUT_S = 60.0
# Longer than the five seconds that httpx keeps a connection: the caller closes first, so that no
# request is sent into a connection that we are closing.
IDLE_TIMEOUT_S = 60
_BACKLOG = 512
# What replies get to be read that are under way when the process ends; less than the supervisor
# gives beyond the time to drain.
STOP_GRACE_S = 1


class HttpServer:
    """Serves an application at an address.

    Args:
        app: The application.
        address: ``HOST:PORT``; port 0 picks a free one.
        tls: What it shows to callers; None for plain text.
    """

    def __init__(self, app: ASGIApp, address: str, tls: ServerTls | None = None) -> None:
        self._app = app
        self._tls = tls
        self._wanted = address
        self._server: _QuietServer | None = None
        self._running: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> None:
        """Listen, and serve from now on.

        Raises:
            PreconditionError: reason ADDRESS_IN_USE.
            InvalidRequestError: files of TLS are amiss.
        """
        context = None if self._tls is None else server_context(self._tls)
        listener = _listen(self._wanted)
        host, port = listener.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        config = uvicorn.Config(
            self._app,
            loop="none",
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            limit_concurrency=LIMITS.num_http_connections_max,
            timeout_keep_alive=IDLE_TIMEOUT_S,
            timeout_graceful_shutdown=STOP_GRACE_S,
            h11_max_incomplete_event_size=LIMITS.http_header_bytes_max,
        )
        config.load()
        # Of our own making: it follows its files.
        config.ssl = context
        if context is None:
            warn_of_plain_text(self.address)
        self._server = _QuietServer(config)
        self._running = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def stop(self) -> None:
        """Take no more connections; return when replies that are under way are out.

        Those that take longer than ``STOP_GRACE_S`` are told that the process ends.
        """
        if self._server is None or self._running is None:
            return
        self._server.should_exit = True
        # Whoever waits here may be out of time; what ends the server goes on.
        await asyncio.shield(self._running)


class _QuietServer(uvicorn.Server):
    """Leaves signals to the process that it is a part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class BoundedProtocol(H11Protocol):
    """A connection that bounds how long its caller may take to send a header or to read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first header."""
        super().connection_made(transport)
        self._watch_header()

    def data_received(self, data: bytes) -> None:
        """Read on."""
        super().data_received(data)
        self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget all timers."""
        self._stop_timers()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The caller does not read as fast as we write."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP in the form that all errors have."""
        error = InvalidRequestError("MALFORMED_HTTP", msg)
        body = encode_json(ErrorForm().body(error))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        try:
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        except h11.LocalProtocolError:
            # A reply has begun on this connection: another one cannot follow it.
            pass
        self.transport.close()

    def _watch_header(self) -> None:
        """A header may take a while in all, however many bytes of it trickle in."""
        cycle: Any = self.cycle
        is_waiting = cycle is None or cycle.response_complete
        if not is_waiting:
            self._stop_header_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self.transport.abort)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_timers(self) -> None:
        self._stop_header_timer()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _listen(address: str) -> socket.socket:
    wanted = parse_host_port(address)
    try:
        found = socket.getaddrinfo(*wanted, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, target = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(target)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise PreconditionError(
            "ADDRESS_IN_USE",
            f"cannot listen on {address}: it is taken, or not an address of this machine",
            address=address,
        ) from error
    listener.setblocking(False)
    return listener
