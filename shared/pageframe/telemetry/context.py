"""W3C trace context: read it, write it, make new ids, decide what is sampled."""

import os
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from pageframe.core.errors import InvalidRequestError

TRACE_ID_BYTES: Final = 16
SPAN_ID_BYTES: Final = 8

SAMPLE_RATIO_DEFAULT: Final = 0.05
_SAMPLE_RATIO_VARIABLE: Final = "OTEL_TRACES_SAMPLER_ARG"

# Version, trace id, parent id, flags; a version above 00 may append more, each after a dash.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_FLAG_SAMPLED = 0x01


class TraceContext(NamedTuple):
    """Where a caller stands: its trace (16 bytes), its span, and whether it is sampled."""

    trace_id: bytes
    span_id: int
    sampled: bool


def parse_traceparent(header: str) -> TraceContext | None:
    """The context in a ``traceparent`` header, or None when the header is not valid.

    An invalid header is ignored, never an error, as W3C Trace Context (level 2, section 4.3)
    asks: a broken tracer upstream must not break the request.
    """
    match = _TRACEPARENT.fullmatch(header.strip())
    if match is None:
        return None
    version, trace_hex, span_hex, flags_hex, more = match.groups()
    trace_id, span_id = bytes.fromhex(trace_hex), int(span_hex, 16)
    if version == "ff" or (version == "00" and more) or not any(trace_id) or not span_id:
        return None
    return TraceContext(trace_id, span_id, bool(int(flags_hex, 16) & _FLAG_SAMPLED))


def format_traceparent(trace_id: bytes, span_id: int, sampled: bool = True) -> str:
    """The ``traceparent`` header that names this span as the parent."""
    assert len(trace_id) == TRACE_ID_BYTES, f"a trace id has 16 bytes, not {len(trace_id)}"
    assert 0 < span_id < 1 << 64, f"not a span id: {span_id}"
    return f"00-{trace_id.hex()}-{span_id:016x}-{_FLAG_SAMPLED if sampled else 0:02x}"


def new_trace_id() -> bytes:
    """16 random bytes, never all zero."""
    while True:
        trace_id = os.urandom(TRACE_ID_BYTES)
        if any(trace_id):
            return trace_id


def new_span_id() -> int:
    """A random span id in ``[1, 2**64)``."""
    while True:
        span_id = int.from_bytes(os.urandom(SPAN_ID_BYTES), "big")
        if span_id:
            return span_id


def span_id_to_bytes(span_id: int) -> bytes:
    """The eight bytes, most significant first, that stand for a span id on the wire."""
    return span_id.to_bytes(SPAN_ID_BYTES, "big")


def span_id_from_bytes(span_id: bytes) -> int:
    """Inverse of ``span_id_to_bytes``; 0 for empty bytes."""
    return int.from_bytes(span_id, "big")


def is_sampled(trace_id: bytes, ratio: float) -> bool:
    """Whether this trace is in the share ``ratio`` of all traces.

    Depends on the id alone, so all processes agree without asking one another. The rule is that
    of OpenTelemetry's ``TraceIdRatioBased`` sampler.
    """
    return int.from_bytes(trace_id[-8:], "big") < round(ratio * (1 << 64))


def sample_ratio_from(environment: Mapping[str, str]) -> float:
    """The share of traces to keep, from ``OTEL_TRACES_SAMPLER_ARG``; 0.05 when it is not set.

    Raises:
        InvalidRequestError: if the value is not a number in ``[0, 1]``.
    """
    text = environment.get(_SAMPLE_RATIO_VARIABLE, "").strip()
    if not text:
        return SAMPLE_RATIO_DEFAULT
    try:
        ratio = float(text)
    except ValueError:
        ratio = float("nan")
    if not 0.0 <= ratio <= 1.0:
        raise InvalidRequestError(
            "SAMPLE_RATIO_INVALID",
            f"{_SAMPLE_RATIO_VARIABLE} must be a number from 0 to 1, not {text!r}",
        )
    return ratio
