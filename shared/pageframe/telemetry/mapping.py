"""From records to OpenTelemetry spans: which trace, which parent, which attributes.

    cause PREFILL   ─▶ the prefill span of the chunk's first position
    cause DECODE    ─▶ the decode span of the position's segment
    other causes    ─▶ the sequence span
    nobody's, or an untraced sequence's ─▶ the process's own trace ("home")

All ids are computed, none is drawn, so a record that is read twice becomes the same span twice
and can be told from a second one.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)

from pageframe.core.trace import KvCause, child_span_id, decode_segment
from pageframe.core.trace import SpanKind as ComputedSpanKind
from pageframe.telemetry import spans as names
from pageframe.telemetry.records import KvRecord, SpanRecord

NUM_SPANS_PER_HOME_TRACE_MAX: Final = 10_000
_INT64_MAX: Final = (1 << 63) - 1
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_UNSET: Final = Status(StatusCode.UNSET)
_SCOPE: Final = InstrumentationScope("pageframe.telemetry")


def kv_span_id(incarnation: int, number: int) -> int:
    """The span id of operation ``number`` of a pool incarnation."""
    return _digest(8, b"kv", incarnation, number) or 1


def home_trace_id(incarnation: int, index: int) -> bytes:
    """The id of the ``index``-th of a process's own traces."""
    return _digest(16, b"home", incarnation, index).to_bytes(16, "big")


def home_root_span_id(incarnation: int, index: int) -> int:
    """The id of that trace's first span."""
    return _digest(8, b"root", incarnation, index) or 1


def _digest(num_bytes: int, domain: bytes, *words: int) -> int:
    packed = domain + struct.pack(f"<{len(words)}Q", *words)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=num_bytes).digest(), "big")


class _ServiceResource(Resource):
    """A resource that hashes once; the encoders hash it for every span, which took a tenth."""

    def __init__(self, resource: Resource) -> None:
        super().__init__(resource.attributes, resource.schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)


class HomeTraces:
    """Traces of what serves no request, each short enough to be opened.

    The one quantity is ``num_spans``, ever put into home traces: it says in which trace and at
    which place the next span goes. The first span of each trace is its root.
    """

    def __init__(self, name: str, resource: Resource, incarnation: int, num_spans: int) -> None:
        self.num_spans = num_spans
        self._name = name
        self._resource = resource
        self._incarnation = incarnation

    def place(self, time_ns: int, made: list[ReadableSpan]) -> tuple[bytes, int]:
        """Trace and parent of the next span; a root that is needed first goes into ``made``."""
        index, place = divmod(self.num_spans, NUM_SPANS_PER_HOME_TRACE_MAX)
        trace_id = home_trace_id(self._incarnation, index)
        root_span_id = home_root_span_id(self._incarnation, index)
        if place == 0:
            made.append(self._root(index, trace_id, root_span_id, time_ns))
            self.num_spans += 1
        self.num_spans += 1
        return trace_id, root_span_id

    def _root(self, index: int, trace_id: bytes, span_id: int, time_ns: int) -> ReadableSpan:
        links: tuple[tuple[bytes, int], ...] = ()
        if index:
            before = index - 1
            links = (
                (
                    home_trace_id(self._incarnation, before),
                    home_root_span_id(self._incarnation, before),
                ),
            )
        return readable_span(
            SpanRecord(
                name=self._name,
                trace_id=trace_id,
                span_id=span_id,
                parent_span_id=0,
                start_ns=time_ns,
                end_ns=time_ns,
                attributes={names.KV_POOL_INCARNATION: self._incarnation},
                links=links,
            ),
            self._resource,
        )


class SpanMapper:
    """Turns the records of one ring into spans.

    Attributes:
        home: The producer's own traces.
    """

    def __init__(
        self,
        *,
        service_name: str,
        incarnation: int,
        producer_pid: int,
        num_home_spans: int = 0,
    ) -> None:
        """See ``HomeTraces`` for ``num_home_spans``; ``OTEL_RESOURCE_ATTRIBUTES`` are added."""
        self._incarnation = incarnation
        self._resource = _ServiceResource(
            Resource.create(
                {
                    "service.name": service_name,
                    "service.instance.id": str(incarnation),
                    "process.pid": producer_pid,
                }
            )
        )
        home_name = names.POOL if service_name == names.SERVICE_EXECUTOR else names.PROCESS
        self.home = HomeTraces(home_name, self._resource, incarnation, num_home_spans)

    def spans(self, record: KvRecord | SpanRecord) -> list[ReadableSpan]:
        """The record's span, after the root of a home trace when it opens one."""
        if isinstance(record, SpanRecord):
            cleaned = replace(
                record,
                name=_text(record.name),
                attributes=_clean(record.attributes),
                error=_text(record.error),
            )
            return [readable_span(cleaned, self._resource)]
        made: list[ReadableSpan] = []
        if record.span_id and any(record.trace_id):
            trace_id, parent_span_id = record.trace_id, _parent_of(record)
        else:
            trace_id, parent_span_id = self.home.place(record.time_ns, made)
        span = SpanRecord(
            name=record.operation.span_name,
            trace_id=trace_id,
            span_id=kv_span_id(self._incarnation, record.number),
            parent_span_id=parent_span_id,
            start_ns=record.time_ns,
            end_ns=record.time_ns,
            attributes=self._kv_attributes(record),
        )
        made.append(readable_span(span, self._resource))
        return made

    def drop_spans(
        self, *, time_ns: int, num_dropped: int, num_dropped_total: int, dropped_by: str
    ) -> list[ReadableSpan]:
        """A span in the home trace that says how many records were lost, and where."""
        made: list[ReadableSpan] = []
        trace_id, parent_span_id = self.home.place(time_ns, made)
        span = SpanRecord(
            name=names.TRACE_DROP,
            trace_id=trace_id,
            span_id=_digest(8, dropped_by.encode(), self._incarnation, num_dropped_total) or 1,
            parent_span_id=parent_span_id,
            start_ns=time_ns,
            end_ns=time_ns,
            attributes={
                names.TRACE_NUM_DROPPED: num_dropped,
                names.TRACE_NUM_DROPPED_TOTAL: num_dropped_total,
                names.TRACE_DROPPED_BY: dropped_by,
            },
            error=f"{num_dropped} records of this trace were lost by the {dropped_by}",
        )
        made.append(readable_span(span, self._resource))
        return made

    def _kv_attributes(self, record: KvRecord) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            names.KV_OPERATION: record.number,
            names.KV_POOL_INCARNATION: self._incarnation,
            names.KV_STEP: record.step,
            names.KV_CAUSE: record.cause.name.lower(),
            names.KV_BLOCKS_FREE_AFTER: record.num_free_after,
        }
        if record.target_ids:
            attributes[names.KV_BLOCK_IDS_SOURCE] = record.block_ids
            attributes[names.KV_BLOCK_IDS_TARGET] = record.target_ids
        else:
            attributes[names.KV_BLOCK_IDS] = record.block_ids
        if record.sequence_id:
            attributes[names.KV_SEQUENCE] = _clean_value(record.sequence_id)
            attributes[names.KV_GENERATION] = record.generation
            attributes[names.KV_POSITION] = record.position
            attributes[names.KV_TENANT] = record.tenant
        return attributes


def readable_span(record: SpanRecord, resource: Resource) -> ReadableSpan:
    """The OpenTelemetry span of a record whose texts and numbers OTLP can carry."""
    context = _context(record.trace_id, record.span_id)
    parent = _context(record.trace_id, record.parent_span_id) if record.parent_span_id else None
    is_server = record.name in names.SERVER_SPANS
    return ReadableSpan(
        record.name,
        context=context,
        parent=parent,
        resource=resource,
        attributes=record.attributes,
        links=tuple(Link(_context(*link)) for link in record.links),
        kind=SpanKind.SERVER if is_server else SpanKind.INTERNAL,
        status=Status(StatusCode.ERROR, record.error) if record.error else _UNSET,
        start_time=record.start_ns,
        end_time=record.end_ns,
        instrumentation_scope=_SCOPE,
    )


def _parent_of(record: KvRecord) -> int:
    if record.cause is KvCause.PREFILL:
        kind, index = ComputedSpanKind.PREFILL, record.position
    elif record.cause is KvCause.DECODE:
        kind, index = ComputedSpanKind.DECODE, decode_segment(record.position)
    else:
        return record.span_id
    return child_span_id(record.span_id, kind, record.generation, index)


def _context(trace_id: bytes, span_id: int) -> SpanContext:
    return SpanContext(
        int.from_bytes(trace_id, "big"), span_id, is_remote=False, trace_flags=_SAMPLED
    )


def _clean(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Values as OTLP has them: 64-bit signed integers, valid UTF-8, sequences as tuples."""
    return {_text(key): _clean_value(value) for key, value in attributes.items()}


def _clean_value(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int) and not -_INT64_MAX - 1 <= value <= _INT64_MAX:
        return str(value)
    if isinstance(value, list):
        return tuple(_clean_value(item) for item in value)
    return value


def _text(text: str) -> str:
    """The same text; a lone surrogate, which protobuf refuses, becomes a question mark."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
