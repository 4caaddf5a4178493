"""The body of a request: one JSON object of bounded size, read within a bounded time."""

import asyncio
import json
from typing import NoReturn

from starlette.datastructures import Headers
from starlette.types import Receive

from pageframe.core.errors import DeadlineError, InvalidRequestError
from pageframe.core.limits import LIMITS

# From the first to the last byte of a body; eight megabytes at 300 kB a second.
BODY_TIMEOUT_S = 30.0
# What is read on, and for how long, of a body that is refused already.
_DISCARDED_BYTES_MAX = 8 * LIMITS.request_bytes_max
_DISCARD_TIMEOUT_S = 2.0


class CallerGoneError(Exception):
    """The caller hung up: there is nobody to answer."""


async def read_object(
    headers: Headers, receive: Receive, *, timeout_s: float = BODY_TIMEOUT_S
) -> dict[str, object]:
    """The JSON object that a request carries.

    A type other than JSON is refused: a page in somebody's browser may send plain text to a server
    on the same machine without asking, but not JSON.

    Raises:
        InvalidRequestError: reason CONTENT_TYPE_UNKNOWN, REQUEST_TOO_LARGE or MALFORMED_JSON.
        DeadlineError: reason BODY_TIMEOUT.
        CallerGoneError: the connection ended first.
    """
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise InvalidRequestError(
            "CONTENT_TYPE_UNKNOWN",
            f"send the header `content-type: application/json`, not {content_type[:80]!r}",
        )
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > LIMITS.request_bytes_max:
        raise _too_large(int(length))
    try:
        async with asyncio.timeout(timeout_s):
            return parse_object(await _read(receive))
    except TimeoutError:
        raise DeadlineError(
            "BODY_TIMEOUT",
            f"the request's body was not complete within {timeout_s:g} s",
            timeout_s=timeout_s,
        ) from None


def parse_object(data: bytes) -> dict[str, object]:
    """The JSON object that ``data`` is.

    Raises:
        InvalidRequestError: reason MALFORMED_JSON.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\u" in data:
            # Half of a surrogate pair is JSON, but no text: it could not be sent on.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except ValueError as error:
        raise _malformed(str(error)[:200]) from None
    if not isinstance(value, dict):
        raise _malformed("it is no object")
    return value


async def discard_body(receive: Receive) -> bool:
    """Read on what is not wanted; whether the caller has come to its end within bounds.

    A caller that is still sending when its connection is closed never sees the answer: the system
    throws it away together with what it had not sent.
    """
    num_bytes = 0
    try:
        async with asyncio.timeout(_DISCARD_TIMEOUT_S):
            while num_bytes <= _DISCARDED_BYTES_MAX:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return True
    except TimeoutError:
        pass  # It sends slowly, or waits for the answer.
    return False


async def _read(receive: Receive) -> bytes:
    pieces: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CallerGoneError
        piece = message.get("body", b"")
        num_bytes += len(piece)
        if num_bytes > LIMITS.request_bytes_max:
            raise _too_large(num_bytes)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _malformed(why: str) -> InvalidRequestError:
    return InvalidRequestError("MALFORMED_JSON", f"the body is not a JSON object: {why}")


def _too_large(num_bytes: int) -> InvalidRequestError:
    return InvalidRequestError(
        "REQUEST_TOO_LARGE",
        f"the request has at least {num_bytes} bytes; at most {LIMITS.request_bytes_max} "
        "are allowed",
        num_bytes=num_bytes,
        num_bytes_max=LIMITS.request_bytes_max,
    )
