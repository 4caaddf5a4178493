"""The trace sink of a service: packs records into the ring and returns.

What a full ring means depends on the mode: ``all`` and ``sampled`` drop the record and count it,
``audit`` waits for the reader. Operations are numbered before they are written, so a dropped one
leaves a gap.

It is the sink that keeps traces from growing without end: when a trace has no room left, the sink
begins a continuation of it, see ``trace_parts``.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from pageframe.core.clock import Clock
from pageframe.core.trace import AttributeValue, KvCause, KvOperation, NullTraceSink, TraceMode
from pageframe.telemetry.context import is_sampled, sample_ratio_from
from pageframe.telemetry.records import (
    KV_OVERHEAD_BYTES_MAX,
    KvLayout,
    kv_layout,
    pack_context,
    unpack_context,
)
from pageframe.telemetry.ring import CAPACITY_BYTES_DEFAULT, RingWriter, record_bytes_max
from pageframe.telemetry.span_records import pack_span
from pageframe.telemetry.trace_parts import (
    KIND_OF_SPAN,
    PartKind,
    Room,
    TraceParts,
    pack_seam,
    part_root,
)

# By the number of block ids, plus that of target ids times 2**32.
_Layouts: TypeAlias = dict[int, KvLayout]
# What records of a sequence carry, their layouts, and the room that its trace has for them.
_Known: TypeAlias = tuple[bytes, _Layouts, Room]

# Kept under `sampled` though they serve no sampled request: rare, and always worth seeing.
_ALWAYS_KEPT: Final = frozenset({KvCause.TAKEOVER, KvCause.INTEGRITY, KvCause.OPERATOR})

# Beyond this a record is cut in two, so that one span stays far under what a collector takes.
_NUM_IDS_PER_RECORD_MAX: Final = 65_536
# Layouts are remembered for records up to this many ids; longer ones are rare.
_NUM_IDS_REMEMBERED_MAX: Final = 256
_WAIT_S: Final = 0.0002
# A reader that consumes nothing for so long is taken for lost, and audit stops waiting for it.
_READER_LOST_AFTER_S: Final = 10.0


class SilentTraceSink(NullTraceSink):
    """Drops everything; what ``create`` returns for ``--trace off``."""

    incarnation = 0
    num_dropped = 0

    def close(self) -> None:
        """Do nothing."""


class RingTraceSink:
    """A ``core.trace.TraceSink`` over a ring, for a service that records from one thread.

    Attributes:
        incarnation: Names this run of the process, and of the block pool it owns.
    """

    def __init__(
        self,
        ring: RingWriter,
        *,
        mode: TraceMode,
        sample_ratio: float = 1.0,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.incarnation = ring.incarnation
        self._ring = ring
        self._mode = mode
        self._sample_ratio = sample_ratio if mode is TraceMode.SAMPLED else 1.0
        # The system's clock without the call in between: a constant, plus what this gives.
        self._ticks = time.monotonic_ns if clock is None else clock.now_ns
        self._base_ns = time.time_ns() - time.monotonic_ns() if clock is None else 0
        self._sleep = sleep
        self._number = 0
        self._layouts: dict[int, _Layouts] = {}
        self._parts = TraceParts()
        self._contexts: dict[int, _Known] = {}
        self._no_context = self._know(pack_context(b"", b"", ""), self._parts.endless)
        # What a sequence without a context gets; None: its records are not wanted.
        self._context_default = None if mode is TraceMode.SAMPLED else self._no_context
        self._record_bytes_max = record_bytes_max(ring.capacity_bytes)
        self._num_ids_max = min(
            _NUM_IDS_PER_RECORD_MAX, (self._record_bytes_max - KV_OVERHEAD_BYTES_MAX) // 4
        )
        assert self._num_ids_max >= 2, f"a ring of {ring.capacity_bytes} bytes is too small"
        self._tail_when_lost = -1

    @classmethod
    def create(
        cls,
        path: Path,
        service_name: str,
        mode: TraceMode,
        *,
        capacity_bytes: int = CAPACITY_BYTES_DEFAULT,
        sample_ratio: float | None = None,
        incarnation: int | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> "RingTraceSink | SilentTraceSink":
        """A sink over a fresh ring at ``path``, or a silent one when nothing is to be traced.

        Args:
            path: Where the exporter looks for the ring; see ``ring_path``.
            service_name: ``service.name`` of the spans.
            mode: How much to trace. ``OTEL_SDK_DISABLED=true`` turns any mode off.
            capacity_bytes: Size of the ring, rounded up to a power of two.
            sample_ratio: Share of traces kept under ``sampled``; ``OTEL_TRACES_SAMPLER_ARG``,
                else 0.05, when not given.
            incarnation: Name of this run, in ``[1, 2**63)``; the start time when not given.
            environment: Where ``OTEL_*`` variables are looked up.

        Raises:
            InvalidRequestError: if ``OTEL_TRACES_SAMPLER_ARG`` is no ratio.
            OSError: if the ring cannot be made.
        """
        is_disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
        if mode is TraceMode.OFF or is_disabled:
            return SilentTraceSink()
        if sample_ratio is None:
            sample_ratio = sample_ratio_from(environment) if mode is TraceMode.SAMPLED else 1.0
        ring = RingWriter(
            path,
            service_name=service_name,
            mode=mode,
            incarnation=time.time_ns() if incarnation is None else incarnation,
            capacity_bytes=capacity_bytes,
        )
        return cls(ring, mode=mode, sample_ratio=sample_ratio)

    @property
    def num_dropped(self) -> int:
        """Records lost so far because the ring was full, or because they were too large for it."""
        return self._ring.num_dropped

    def sequence_begin(
        self, sequence_id: int, *, trace_id: bytes, span_id: bytes, request_id: str, tenant: str
    ) -> None:
        """Give the context that later ``kv`` records of this sequence carry."""
        if self._mode is TraceMode.SAMPLED and not self._is_wanted(trace_id):
            return
        context = pack_context(trace_id, span_id, tenant)
        is_traced = any(trace_id) and any(span_id)
        room = self._parts.room(trace_id if is_traced else b"", PartKind.OPERATIONS)
        self._contexts[sequence_id] = self._know(context, room)

    def sequence_end(self, sequence_id: int) -> None:
        """Forget the context."""
        self._contexts.pop(sequence_id, None)

    def kv(
        self,
        operation: KvOperation,
        cause: KvCause,
        *,
        sequence_id: int,
        generation: int,
        position: int,
        step: int,
        block_ids: Sequence[int],
        target_ids: Sequence[int] = (),
        num_free_after: int,
    ) -> None:
        """Record one operation on blocks; see ``core.trace.TraceSink``.

        This is the hot path: one look-up for the sequence's context, one for the layout of a
        record of this shape, one packing straight into the ring.
        """
        known = self._contexts.get(sequence_id, self._context_default)
        if known is None:
            if cause not in _ALWAYS_KEPT:
                return
            known = self._no_context
        context, layouts, room = known
        room.num_left -= 1
        if room.num_left < 0:
            context, layouts, room = self._move_on(sequence_id, known)
        shape = num_block_ids = len(block_ids)
        if target_ids:
            shape |= len(target_ids) << 32
            block_ids = [*block_ids, *target_ids]
        layout = layouts.get(shape)
        if layout is None:
            if len(block_ids) > self._num_ids_max:
                self._kv_in_parts(
                    operation,
                    cause,
                    sequence_id=sequence_id,
                    generation=generation,
                    position=position,
                    step=step,
                    block_ids=block_ids[:num_block_ids],
                    target_ids=target_ids,
                    num_free_after=num_free_after,
                )
                return
            layout = _new_layout(layouts, len(context), num_block_ids, len(target_ids), room.part)
        pack_into, num_bytes, header, sizes = layout
        self._number = number = self._number + 1
        ring = self._ring
        if ring.offset + num_bytes > ring.room_end and not self._make_room(num_bytes):
            return
        time_ns = self._base_ns + self._ticks()
        # fmt: off
        if shape == 1:  # The usual record; without a list to unpack it takes a sixth less time.
            pack_into(
                ring.memory, ring.offset, header, time_ns, number, sequence_id, step, generation,
                position, num_free_after, operation, cause, sizes, context, block_ids[0],
            )
        else:
            pack_into(
                ring.memory, ring.offset, header, time_ns, number, sequence_id, step, generation,
                position, num_free_after, operation, cause, sizes, context, *block_ids,
            )
        # fmt: on
        ring.publish(num_bytes)

    def span(
        self,
        name: str,
        *,
        trace_id: bytes,
        span_id: int,
        parent_span_id: int,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, AttributeValue],
        links: Sequence[tuple[bytes, int]] = (),
        error: str = "",
    ) -> None:
        """Record a finished span of a traced request; see ``core.trace.TraceSink``."""
        if not self._is_wanted(trace_id):
            return
        kind = KIND_OF_SPAN.get(name)
        if kind is not None:
            room = self._room_for_span(trace_id, kind, parent_span_id)
            if room.part:
                links = (*links, (trace_id, parent_span_id))
                trace_id, parent_span_id = part_root(trace_id, self.incarnation, kind, room.part)
        record = pack_span(
            name,
            trace_id=trace_id,
            span_id=span_id,
            parent_span_id=parent_span_id,
            start_ns=start_ns,
            end_ns=end_ns,
            attributes=attributes,
            links=links,
            error=error,
        )
        self._write(record)

    def close(self) -> None:
        """Say that nothing follows. The exporter reads what is left and removes the file."""
        self._ring.close()

    def _know(self, context: bytes, room: Room) -> _Known:
        # Records of a continuation have headers, so layouts, of their own; they are rare.
        layouts = {} if room.part else self._layouts.setdefault(len(context), {})
        return context, layouts, room

    def _move_on(self, sequence_id: int, known: _Known) -> _Known:
        """The trace has no room left for this sequence's operations: they go to its next part."""
        context, _, full = known
        room, is_new = self._parts.after(full)
        if is_new:
            self._lead_on(room, unpack_context(context).span_id)
        self._contexts[sequence_id] = known = self._know(context, room)
        return known

    def _room_for_span(self, trace_id: bytes, kind: PartKind, parent_span_id: int) -> Room:
        room = self._parts.room(trace_id, kind)
        room.num_left -= 1
        if room.num_left < 0:
            room, is_new = self._parts.after(room)
            if is_new:
                self._lead_on(room, parent_span_id)
        return room

    def _lead_on(self, room: Room, parent_span_id: int) -> None:
        now_ns = self._base_ns + self._ticks()
        for record in pack_seam(room, self.incarnation, parent_span_id, now_ns):
            self._write(record)

    def _write(self, record: bytes) -> None:
        if len(record) > self._record_bytes_max:
            self._ring.count_dropped()
        elif not self._ring.try_write(record) and self._make_room(len(record)):
            self._ring.try_write(record)

    def _is_wanted(self, trace_id: bytes) -> bool:
        is_all = self._sample_ratio == 1.0
        return bool(trace_id) and (is_all or is_sampled(trace_id, self._sample_ratio))

    def _kv_in_parts(
        self,
        operation: KvOperation,
        cause: KvCause,
        *,
        sequence_id: int,
        generation: int,
        position: int,
        step: int,
        block_ids: Sequence[int],
        target_ids: Sequence[int],
        num_free_after: int,
    ) -> None:
        """Record an operation on more blocks than fit into one record as several."""
        num_ids = self._num_ids_max // 2
        for start in range(0, max(len(block_ids), len(target_ids)), num_ids):
            self.kv(
                operation,
                cause,
                sequence_id=sequence_id,
                generation=generation,
                position=position,
                step=step,
                block_ids=block_ids[start : start + num_ids],
                target_ids=target_ids[start : start + num_ids],
                num_free_after=num_free_after,
            )

    def _make_room(self, num_bytes: int) -> bool:
        """Wait for room under ``audit`` while the reader lives; else count a dropped record."""
        if self._ring.make_room(num_bytes):
            return True
        tail = self._ring.tail
        if self._mode is not TraceMode.AUDIT or tail == self._tail_when_lost:
            self._ring.count_dropped()
            return False
        waited_s = 0.0
        while not self._ring.make_room(num_bytes):
            if self._ring.tail != tail:
                tail, waited_s = self._ring.tail, 0.0
            if waited_s >= _READER_LOST_AFTER_S:
                self._tail_when_lost = tail
                self._ring.count_dropped()
                return False
            self._sleep(_WAIT_S)
            waited_s += _WAIT_S
        return True


def _new_layout(
    layouts: _Layouts, num_context_bytes: int, num_block_ids: int, num_target_ids: int, part: int
) -> KvLayout:
    layout = kv_layout(num_context_bytes, num_block_ids, num_target_ids, part)
    if num_block_ids + num_target_ids <= _NUM_IDS_REMEMBERED_MAX:
        layouts[num_block_ids | num_target_ids << 32] = layout
    return layout


class LockedRingTraceSink(RingTraceSink):
    """A ``RingTraceSink`` that several threads of one process may use."""

    def __init__(self, ring: RingWriter, **options: Any) -> None:
        super().__init__(ring, **options)
        # Reentrant, because an operation on very many blocks records its parts through `kv`.
        self._lock = threading.RLock()

    def kv(self, operation: KvOperation, cause: KvCause, **details: Any) -> None:
        """Record one operation on blocks; numbers and order in the ring agree."""
        with self._lock:
            super().kv(operation, cause, **details)

    def span(self, name: str, **details: Any) -> None:
        """Record a finished span."""
        with self._lock:
            super().span(name, **details)
