"""From records to OpenTelemetry spans: which trace, which parent, which attributes.

    cause PREFILL   ─▶ the prefill span of the chunk's first position
    cause DECODE    ─▶ the decode span of the position's segment
    other causes    ─▶ the sequence span
    a later part of a long trace ─▶ that part's root, with a link to the parent that it left
    nobody's, or an untraced sequence's ─▶ the process's own trace ("home")

All ids are computed, none is drawn, so a record that is read twice becomes the same span twice
and can be told from a second one.

This is the slow, obvious way, for whatever is rare. ``kv_encoder`` and ``span_encoder`` go from a
packed record to encoded bytes ten times faster; tests compare the two ways.
"""

import functools
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
from pageframe.telemetry.record_batch import Loss, Producer
from pageframe.telemetry.records import KvRecord
from pageframe.telemetry.span_records import SpanRecord
from pageframe.telemetry.trace_parts import PartKind, part_root

# Leaves room for the root and for spans that tell of losses: no trace has more than 10,000 spans.
NUM_OPERATIONS_PER_HOME_TRACE: Final = 9_000
_INT64_MAX: Final = (1 << 63) - 1
_MASK_64: Final = (1 << 64) - 1
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_UNSET: Final = Status(StatusCode.UNSET)
_SCOPE: Final = InstrumentationScope("pageframe.telemetry")


def kv_span_id(incarnation: int, number: int) -> int:
    """The span id of operation ``number`` of a pool incarnation, in ``[1, 2**64)``.

    The operations of an incarnation count on from its own start, so no two of them share an id.
    """
    return (kv_span_id_start(incarnation) + number) & _MASK_64 or 1


@functools.lru_cache(maxsize=64)
def kv_span_id_start(incarnation: int) -> int:
    """Where the span ids of an incarnation start; see ``kv_span_id``."""
    return _digest(8, b"kv", incarnation)


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

    The number of an operation says in which trace it goes, so that any exporter puts it there. The
    first span of a trace is its root; a new exporter makes it again, with the same id.
    """

    def __init__(self, name: str, resource: Resource, incarnation: int) -> None:
        self._name = name
        self._resource = resource
        self._incarnation = incarnation
        self._index = -1
        self._ids = (b"", 0)

    def place(self, number: int, time_ns: int, made: list[ReadableSpan]) -> tuple[bytes, int]:
        """Trace and parent of an operation; a root that is needed first goes into ``made``."""
        index = number // NUM_OPERATIONS_PER_HOME_TRACE
        if index != self._index:
            before, self._index = self._index, index
            self._ids = (
                home_trace_id(self._incarnation, index),
                home_root_span_id(self._incarnation, index),
            )
            made.append(self._root(before, time_ns))
        return self._ids

    def place_last(self, time_ns: int, made: list[ReadableSpan]) -> tuple[bytes, int]:
        """The same for what has no number: beside the operation before it."""
        number = max(self._index, 0) * NUM_OPERATIONS_PER_HOME_TRACE
        return self.place(number, time_ns, made)

    def _root(self, index_before: int, time_ns: int) -> ReadableSpan:
        links: tuple[tuple[bytes, int], ...] = ()
        if index_before >= 0:
            links = (
                (
                    home_trace_id(self._incarnation, index_before),
                    home_root_span_id(self._incarnation, index_before),
                ),
            )
        trace_id, span_id = self._ids
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
        incarnation: Names this run of the producer.
        resource: Says whose the spans are.
    """

    def __init__(self, producer: Producer) -> None:
        """``OTEL_RESOURCE_ATTRIBUTES`` are added to what is known of the producer."""
        self.incarnation = producer.incarnation
        self.resource = _ServiceResource(
            Resource.create(
                {
                    "service.name": producer.service_name,
                    "service.instance.id": str(producer.incarnation),
                    "process.pid": producer.pid,
                }
            )
        )
        is_executor = producer.service_name == names.SERVICE_EXECUTOR
        home_name = names.POOL if is_executor else names.PROCESS
        self.home = HomeTraces(home_name, self.resource, producer.incarnation)

    def spans(self, record: KvRecord | SpanRecord) -> list[ReadableSpan]:
        """The record's span, after the root of a home trace when it opens one."""
        if isinstance(record, SpanRecord):
            cleaned = replace(
                record,
                name=_text(record.name),
                attributes=_clean(record.attributes),
                error=_text(record.error),
            )
            return [readable_span(cleaned, self.resource)]
        made: list[ReadableSpan] = []
        links: tuple[tuple[bytes, int], ...] = ()
        if record.span_id and any(record.trace_id):
            trace_id = record.trace_id
            parent_span_id = kv_parent_span_id(
                record.span_id, record.cause, record.generation, record.position
            )
            if record.part:
                links = ((trace_id, parent_span_id),)
                trace_id, parent_span_id = part_root(
                    trace_id, self.incarnation, PartKind.OPERATIONS, record.part
                )
        else:
            trace_id, parent_span_id = self.home.place(record.number, record.time_ns, made)
        span = SpanRecord(
            name=record.operation.span_name,
            trace_id=trace_id,
            span_id=kv_span_id(self.incarnation, record.number),
            parent_span_id=parent_span_id,
            start_ns=record.time_ns,
            end_ns=record.time_ns,
            attributes=self._kv_attributes(record),
            links=links,
        )
        made.append(readable_span(span, self.resource))
        return made

    def loss_spans(self, loss: Loss, time_ns: int) -> list[ReadableSpan]:
        """A span in the home trace that says how much was lost, and where."""
        made: list[ReadableSpan] = []
        trace_id, parent_span_id = self.home.place_last(time_ns, made)
        span = SpanRecord(
            name=names.TRACE_DROP,
            trace_id=trace_id,
            span_id=_digest(8, loss.lost_by.encode(), self.incarnation, loss.num_lost_total) or 1,
            parent_span_id=parent_span_id,
            start_ns=time_ns,
            end_ns=time_ns,
            attributes={
                names.TRACE_NUM_DROPPED: loss.num_lost,
                names.TRACE_NUM_DROPPED_TOTAL: loss.num_lost_total,
                names.TRACE_DROPPED_BY: loss.lost_by,
            },
            error=f"{loss.num_lost} records of this trace were lost by the {loss.lost_by}",
        )
        made.append(readable_span(span, self.resource))
        return made

    def _kv_attributes(self, record: KvRecord) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            names.KV_OPERATION: record.number,
            names.KV_POOL_INCARNATION: self.incarnation,
            names.KV_STEP: clean_value(record.step),
            names.KV_CAUSE: record.cause.name.lower(),
            names.KV_BLOCKS_FREE_AFTER: record.num_free_after,
        }
        if record.target_ids:
            attributes[names.KV_BLOCK_IDS_SOURCE] = record.block_ids
            attributes[names.KV_BLOCK_IDS_TARGET] = record.target_ids
        else:
            attributes[names.KV_BLOCK_IDS] = record.block_ids
        if record.sequence_id:
            attributes[names.KV_SEQUENCE] = clean_value(record.sequence_id)
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


def any_span(resource: Resource) -> ReadableSpan:
    """Some span of this process; for what stands around spans, whatever they say."""
    record = SpanRecord(
        name="", trace_id=b"\1", span_id=1, parent_span_id=0, start_ns=0, end_ns=0, attributes={}
    )
    return readable_span(record, resource)


def kv_parent_span_id(span_id: int, cause: KvCause, generation: int, position: int) -> int:
    """Under which span an operation hangs; ``span_id`` is that of its sequence."""
    if cause.is_prefill:
        kind, index = ComputedSpanKind.PREFILL, position
    elif cause is KvCause.DECODE:
        kind, index = ComputedSpanKind.DECODE, decode_segment(position)
    else:
        return span_id
    return child_span_id(span_id, kind, generation, index)


def _context(trace_id: bytes, span_id: int) -> SpanContext:
    return SpanContext(
        int.from_bytes(trace_id, "big"), span_id, is_remote=False, trace_flags=_SAMPLED
    )


def _clean(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Values as OTLP has them: 64-bit signed integers, valid UTF-8, sequences as tuples."""
    return {_text(key): clean_value(value) for key, value in attributes.items()}


def clean_value(value: Any) -> Any:
    """The value as OTLP can carry it; what it cannot becomes text."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int) and not -_INT64_MAX - 1 <= value <= _INT64_MAX:
        return str(value)
    if isinstance(value, list):
        return tuple(clean_value(item) for item in value)
    return value


def _text(text: str) -> str:
    """The same text; a lone surrogate, which protobuf refuses, becomes a question mark."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
