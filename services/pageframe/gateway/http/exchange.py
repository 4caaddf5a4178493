"""One HTTP exchange: who asks, what is answered, and what becomes of a caller that hangs up."""

import asyncio
import json
import re
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import structlog
from starlette.datastructures import Headers, QueryParams
from starlette.types import Receive, Scope, Send

from pageframe.core.errors import (
    InternalError,
    InvalidRequestError,
    PageframeError,
    UnavailableError,
)
from pageframe.gateway.http.body import CallerGoneError, discard_body, read_object
from pageframe.gateway.http.errors import ErrorForm, http_code, retry_headers
from pageframe.telemetry.context import TraceContext, parse_traceparent

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")

REQUEST_ID_HEADER = "x-request-id"
TIMEOUT_HEADER = "x-pageframe-timeout-ms"
TRACE_ID_HEADER = "x-pageframe-trace-id"
SEED_HEADER = "x-pageframe-seed"
# What a header may repeat: printable, and no longer than a request's name may be.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# A longer wait than this is as good as one without end; it keeps nanoseconds within 64 bits.
_TIMEOUT_MS_MAX = 366 * 24 * 3600 * 1000
_JSON = "application/json"


class Exchange:
    """One request and its answer.

    Attributes:
        headers: Of the request.
        path_params: Parts of the path that the route names.
        query_params: What stands behind the path's question mark; of a name given twice the last.
        request_id: The caller's name for the request, or one made for it.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = Headers(scope=scope)
        self.path_params: Mapping[str, str] = scope.get("path_params", {})
        self.query_params: Mapping[str, str] = QueryParams(scope.get("query_string", b""))
        self.request_id = request_id_of(self.headers)
        self._receive = receive
        self._send = send
        self._has_body = scope["method"] == "POST"
        self._is_streaming = False

    @property
    def trace_context(self) -> TraceContext | None:
        """Where the caller stands, if it said so."""
        return parse_traceparent(self.headers.get("traceparent", ""))

    def timeout_ms(self) -> int | None:
        """How long the caller will wait; None for no bound.

        Raises:
            InvalidRequestError: reason MALFORMED_HEADER.
        """
        value = self.headers.get(TIMEOUT_HEADER)
        if value is None:
            return None
        if not (value.isascii() and value.isdigit() and len(value) <= 18):
            raise InvalidRequestError(
                "MALFORMED_HEADER",
                f"{TIMEOUT_HEADER} is {value[:40]!r}; it must be a number of milliseconds",
                field=TIMEOUT_HEADER,
            )
        return None if int(value) > _TIMEOUT_MS_MAX else int(value)

    async def read_body(self) -> dict[str, object]:
        """The JSON object that was sent.

        Raises:
            PageframeError: as ``read_object``.
            CallerGoneError: the connection ended first.
        """
        body = await read_object(self.headers, self._receive)
        self._has_body = False
        return body

    async def while_connected(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do ``work`` once the body is read; it is cancelled when the caller hangs up.

        Raises:
            CallerGoneError: the caller did.
        """
        working = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._wait_gone())
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise CallerGoneError
            return working.result()
        finally:
            working.cancel()
            gone.cancel()
            await asyncio.gather(working, gone, return_exceptions=True)

    async def answer(
        self,
        code: int,
        data: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        content_type: str = _JSON,
    ) -> None:
        """Answer with everything at once."""
        given = {"content-length": str(len(data)), **(headers or {})}
        if self._has_body and not await discard_body(self._receive):
            given["connection"] = "close"
        await self._start(code, content_type, given)
        await self._send({"type": "http.response.body", "body": data})

    async def begin_stream(self, headers: Mapping[str, str]) -> None:
        """Begin a stream of server-sent events."""
        self._is_streaming = True
        # Proxies that gather a reply before they pass it on would undo the stream.
        given = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        await self._start(200, "text/event-stream; charset=utf-8", given)

    async def send_event(self, value: object) -> None:
        """Send one event."""
        await self._send_data(encode_json(value))

    async def send_encoded(self, data: bytes) -> None:
        """Send one event that is JSON on one line already; several callers may get the same."""
        await self._send_data(data)

    async def end_stream(self) -> None:
        """Say that the stream is complete, and end it."""
        await self._send_data(b"[DONE]")
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: PageframeError, form: ErrorForm) -> None:
        """Answer with an error; within a stream it is the last event, and nothing says DONE."""
        if self._is_streaming:
            await self.send_event(form.body(error))
            await self._send({"type": "http.response.body", "body": b""})
        else:
            await self.answer(http_code(error), encode_json(form.body(error)), retry_headers(error))

    async def _start(self, code: int, content_type: str, headers: Mapping[str, str]) -> None:
        named = {"content-type": content_type, REQUEST_ID_HEADER: self.request_id, **headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
        await self._send({"type": "http.response.start", "status": code, "headers": raw})

    async def _send_data(self, data: bytes) -> None:
        body = b"data: " + data + b"\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _wait_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


class Endpoint:
    """An ASGI application that answers one kind of request, errors included.

    Args:
        handle: Answers; a ``PageframeError`` that it raises becomes an answer, too.
        form: How errors are said.
    """

    def __init__(
        self, handle: Callable[[Exchange], Awaitable[None]], form: ErrorForm | None = None
    ) -> None:
        self._handle = handle
        self._form = form or ErrorForm()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = Exchange(scope, receive, send)
        try:
            await self._handle(exchange)
        except CallerGoneError:
            return
        except asyncio.CancelledError:
            ending = UnavailableError("DRAINING", "this gateway has shut down; try another one")
            await exchange.fail(ending, self._form)
        except PageframeError as error:
            await exchange.fail(error, self._form)
        except Exception:
            _log.exception("handler_failed")
            # Its text may hold what is nobody else's business.
            failure = InternalError("INTERNAL", "the server failed; its log has the details")
            await exchange.fail(failure, self._form)


def request_id_of(headers: Headers) -> str:
    """The caller's name for its request if it can be repeated, else a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def encode_json(value: object) -> bytes:
    """``value`` as JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
