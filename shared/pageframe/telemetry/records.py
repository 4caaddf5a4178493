"""What lies in the ring: one packed record per KV operation; ``span_records`` has finished spans.

A KV record carries the trace context of its sequence, so each can be understood alone: a reader
that comes late or restarts, and a record lost before it, change nothing for those after it.

    KV     header, part of the trace, time, operation number, sequence, step, generation, position,
           free blocks, operation, cause, sizes │ trace id, span id, tenant │ block ids │ target ids

Integers are little-endian; block ids take four bytes each.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from pageframe.core.trace import KvCause, KvOperation
from pageframe.telemetry.context import SPAN_ID_BYTES, TRACE_ID_BYTES
from pageframe.telemetry.ring import ALIGNMENT_BYTES, RECORD_HEADER, RecordKind
from pageframe.telemetry.span_records import SpanRecord, unpack_span

KV_FIXED: Final = struct.Struct("<IHHQQQQIIIBBHII")
_KV_HEADER: Final = struct.Struct("<IHH")
_KV_SIZES: Final = struct.Struct("<HII")
_BLOCK_ID_BYTES: Final = 4
_TENANT_BYTES_MAX: Final = 256
_IDS_BYTES: Final = TRACE_ID_BYTES + SPAN_ID_BYTES

KV_OVERHEAD_BYTES_MAX: Final = KV_FIXED.size + _IDS_BYTES + _TENANT_BYTES_MAX + ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRecord:
    """One operation on blocks.

    Attributes:
        time_ns: When, nanoseconds since the Unix epoch.
        number: Running number of the operation within its pool incarnation, from 1.
        operation: What.
        cause: Why.
        sequence_id: For whom; 0 for nobody.
        generation: Of the sequence.
        position: First position of the prefill chunk, or the decoded token's.
        step: Step number; 0 outside any step.
        num_free_after: Free blocks after it.
        trace_id: Of the request; zeros when it is not traced.
        span_id: Of the sequence span; 0 when it is not traced.
        tenant: Whose request; may be empty.
        block_ids: Blocks; for copies the sources.
        target_ids: For copies the targets.
        part: Which part of the request's trace it goes to; see ``trace_parts``.
    """

    time_ns: int
    number: int
    operation: KvOperation
    cause: KvCause
    sequence_id: int
    generation: int
    position: int
    step: int
    num_free_after: int
    trace_id: bytes
    span_id: int
    tenant: str
    block_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    part: int = 0


def pack_context(trace_id: bytes, span_id: bytes, tenant: str) -> bytes:
    """The part of a KV record that is the same for all records of a sequence.

    Zeros stand for empty ids; the tenant is cut after 256 bytes and padded to whole words.
    """
    ids = trace_id.ljust(TRACE_ID_BYTES, b"\0") + span_id.ljust(SPAN_ID_BYTES, b"\0")
    assert len(ids) == _IDS_BYTES, f"trace id of {len(trace_id)}, span id of {len(span_id)} bytes"
    name = tenant.encode("utf-8", "replace")[:_TENANT_BYTES_MAX]
    return ids + name + bytes(-len(name) % ALIGNMENT_BYTES)


class RecordContext(NamedTuple):
    """What ``pack_context`` packed: trace id (16 bytes), span id (0 for none), tenant."""

    trace_id: bytes
    span_id: int
    tenant: str

    @property
    def is_traced(self) -> bool:
        """Whether it belongs to the trace of a request."""
        return bool(self.span_id) and any(self.trace_id)


def unpack_context(context: bytes) -> RecordContext:
    """Inverse of ``pack_context``; zeros stand for empty ids."""
    return RecordContext(
        context[:TRACE_ID_BYTES],
        int.from_bytes(context[TRACE_ID_BYTES:_IDS_BYTES], "big"),
        context[_IDS_BYTES:].rstrip(b"\0").decode("utf-8", "replace"),
    )


class KvLayout(NamedTuple):
    """How KV records of one shape are packed.

    The packing function takes a buffer, an offset, and then ``header``, time, operation number,
    sequence, step, generation, position, free blocks, operation, cause, ``sizes``, the context,
    and each block and target id.
    """

    pack_into: Callable[..., None]
    num_bytes: int
    header: bytes
    sizes: bytes


def kv_layout(
    num_context_bytes: int, num_block_ids: int, num_target_ids: int, part: int = 0
) -> KvLayout:
    """The layout of KV records with this context and so many ids, for one part of a trace."""
    num_ids = num_block_ids + num_target_ids
    padding = (-num_ids * _BLOCK_ID_BYTES) % ALIGNMENT_BYTES
    ids = f"{num_ids}I" if num_ids else ""
    # What is the same for all records of a shape goes in as bytes: each value costs 15 ns to pack.
    layout = struct.Struct(f"<8sQQQQIIIBB{_KV_SIZES.size}s{num_context_bytes}s{ids}{padding}x")
    return KvLayout(
        layout.pack_into,
        layout.size,
        _KV_HEADER.pack(layout.size, RecordKind.KV, part),
        _KV_SIZES.pack(num_context_bytes, num_block_ids, num_target_ids),
    )


def unpack_kv(record: bytes) -> KvRecord:
    """Inverse of packing with a ``KvLayout``.

    Raises:
        ValueError: if the operation or the cause is unknown.
        struct.error: if the record is shorter than it says.
    """
    # fmt: off
    (
        _length, _kind, part, time_ns, number, sequence_id, step, generation, position,
        num_free_after, operation, cause, num_context_bytes, num_block_ids, num_target_ids,
    ) = KV_FIXED.unpack_from(record)
    # fmt: on
    ids_start = KV_FIXED.size + num_context_bytes
    context = unpack_context(record[KV_FIXED.size : ids_start])
    ids = struct.unpack_from(f"<{num_block_ids + num_target_ids}I", record, ids_start)
    return KvRecord(
        time_ns=time_ns,
        number=number,
        operation=KvOperation(operation),
        cause=KvCause(cause),
        sequence_id=sequence_id,
        generation=generation,
        position=position,
        step=step,
        num_free_after=num_free_after,
        trace_id=context.trace_id,
        span_id=context.span_id,
        tenant=context.tenant,
        block_ids=ids[:num_block_ids],
        target_ids=ids[num_block_ids:],
        part=part,
    )


def unpack(record: bytes) -> KvRecord | SpanRecord:
    """What a record says.

    Raises:
        ValueError: if its kind is unknown or its content broken.
        struct.error: if it is shorter than it says.
    """
    kind = RecordKind(RECORD_HEADER.unpack_from(record)[1])
    assert kind is not RecordKind.PAD, "padding says nothing"
    return unpack_kv(record) if kind is RecordKind.KV else unpack_span(record)
