"""Reads traces back from OTLP JSON lines; for command line tools and tests."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pageframe.core.errors import InvalidRequestError, NotFoundError
from pageframe.core.units import NANOSECONDS_PER_MILLISECOND
from pageframe.telemetry import spans as names


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One span of a trace file.

    Attributes:
        service: ``service.name`` of its process.
        trace_id: 16 bytes.
        span_id: In ``[1, 2**64)``.
        parent_span_id: 0 for a root.
        name: For example ``kv.allocate``.
        start_ns: Nanoseconds since the Unix epoch.
        end_ns: The same.
        attributes: Values as Python has them; arrays are tuples.
        links: Pairs of trace id and span id.
        error: Text of an error status; empty when there is none.
    """

    service: str
    trace_id: bytes
    span_id: int
    parent_span_id: int
    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    links: tuple[tuple[bytes, int], ...] = ()
    error: str = ""

    @property
    def duration_ms(self) -> float:
        """End minus start."""
        return (self.end_ns - self.start_ns) / NANOSECONDS_PER_MILLISECOND


def read_spans(path: Path) -> list[Span]:
    """All spans of a ``.jsonl`` file, or of all such files of a folder, each once, by start time.

    A last line without an end is still being written and is left out.

    Raises:
        NotFoundError: if there is nothing at ``path``.
        InvalidRequestError: if a line is no OTLP JSON; the message names it.
    """
    if not path.exists():
        raise NotFoundError("TRACE_NOT_FOUND", f"there is no trace at {path}")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    spans: dict[tuple[bytes, int], Span] = {}
    for file in files:
        for span in _read_file(file):
            # Export is at least once; ids are computed, so a repetition is known by its id.
            spans.setdefault((span.trace_id, span.span_id), span)
    return sorted(spans.values(), key=lambda span: (span.start_ns, -span.end_ns))


def spans_by_trace(spans: Sequence[Span]) -> dict[bytes, list[Span]]:
    """The spans of each trace, in the order given."""
    traces: dict[bytes, list[Span]] = {}
    for span in spans:
        traces.setdefault(span.trace_id, []).append(span)
    return traces


def join_parts(spans: Sequence[Span]) -> list[Span]:
    """The spans as if no trace had ever been split, in the order given; see ``trace_parts``.

    What was moved is back in its request's trace and under its own parent; the seams are left out.
    """
    continuations = {span.trace_id for span in spans if span.name == names.CONTINUATION}
    return [
        _put_back(span) if span.trace_id in continuations else span
        for span in spans
        if span.name not in (names.CONTINUED, names.CONTINUATION)
    ]


def _put_back(span: Span) -> Span:
    *links, (trace_id, parent_span_id) = span.links
    return replace(span, trace_id=trace_id, parent_span_id=parent_span_id, links=tuple(links))


def _read_file(file: Path) -> Iterator[Span]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield from spans_of(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidRequestError(
                    "TRACE_MALFORMED", f"{file} line {number} is no OTLP JSON: {error}"
                ) from error


def spans_of(request: Mapping[str, Any]) -> Iterator[Span]:
    """The spans of one OTLP JSON request, as ``json`` reads it.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: if it is none.
    """
    for resource_spans in request["resourceSpans"]:
        resource = _attributes(resource_spans.get("resource", {}))
        for scope_spans in resource_spans.get("scopeSpans", ()):
            for span in scope_spans.get("spans", ()):
                yield _span(str(resource.get("service.name", "")), span)


def _span(service: str, span: dict[str, Any]) -> Span:
    # Fields that are zero or empty may be left out: that is how protobuf writes JSON.
    status = span.get("status", {})
    is_error = status.get("code") in (2, "STATUS_CODE_ERROR")
    return Span(
        service=service,
        trace_id=bytes.fromhex(span["traceId"]),
        span_id=int(span["spanId"], 16),
        parent_span_id=int(span.get("parentSpanId") or "0", 16),
        name=span.get("name", ""),
        start_ns=int(span.get("startTimeUnixNano", 0)),
        end_ns=int(span.get("endTimeUnixNano", 0)),
        attributes=_attributes(span),
        links=tuple(
            (bytes.fromhex(link["traceId"]), int(link["spanId"], 16))
            for link in span.get("links", ())
        ),
        error=(status.get("message") or "error") if is_error else "",
    )


def _attributes(holder: dict[str, Any]) -> dict[str, Any]:
    return {item["key"]: _value(item.get("value", {})) for item in holder.get("attributes", ())}


def _value(value: dict[str, Any]) -> Any:
    """An OTLP AnyValue: a dictionary whose only key names the type."""
    if not value:
        return None
    ((kind, content),) = value.items()
    if kind == "intValue":
        return int(content)
    if kind == "doubleValue":
        return float(content)
    if kind == "arrayValue":
        return tuple(_value(item) for item in content.get("values", ()))
    return content
