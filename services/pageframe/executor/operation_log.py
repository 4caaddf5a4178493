"""The last operations on blocks for those who watch, and the last one on each block.

    step thread ──kv──▶ pending numbers ──1,024 operations─▶ chunk of arrays ──▶ chunks, newest last
                                                               │                  ▲ read, any thread
                                                               └──▶ one row for each block

The simple thing is a deque of one object per operation. Tens of thousands of objects that live long
make every full garbage collection longer, and each costs its allocation; so an operation leaves
only numbers in two flat lists, and 1,024 of them together become a chunk of arrays.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pageframe.core.clock import Clock
from pageframe.core.trace import AttributeValue, KvCause, KvOperation, TraceSink
from pageframe.executor.operation_chunk import (
    NUM_WORDS,
    LastOperation,
    OperationChunk,
    last_operation,
    pack_chunk,
)
from pageframe.executor.sequence_owners import SequenceOwner, SequenceOwners
from pageframe.wire.memory_facts import OperationBatch, OperationRecord

NUM_OPERATIONS_DEFAULT: Final = 65_536
"""How many operations are kept; a second or so of a very busy executor, minutes of a usual one."""

NUM_BLOCK_IDS_DEFAULT: Final = 1 << 20
"""How many block ids they may name together; 4 MiB."""

NUM_IDS_PER_OPERATION_MAX: Final = 4096
"""An operation on more blocks is recorded as several."""

NUM_OPERATIONS_PER_CHUNK: Final = 1024
"""The cost of an array instruction is shared by so many; making a chunk takes about 0.2 ms."""

_NUM_PENDING_WORDS_MAX: Final = NUM_OPERATIONS_PER_CHUNK * NUM_WORDS
_NUM_PENDING_IDS_MAX: Final = 65_536
# Up to so many ids nobody has to ask whether the pending ones become too many.
_NUM_IDS_FEW: Final = _NUM_PENDING_IDS_MAX // NUM_OPERATIONS_PER_CHUNK


class OperationLog:
    """A ``core.trace.TraceSink`` that passes everything on and keeps the last operations.

    They are counted from 1, as the trace's sink counts them when it keeps all (``all``, ``audit``),
    so a number here is the ``kv.operation`` of a span there. All methods but ``read`` are
    called on the thread that records.

    Args:
        inner: Where everything goes on to.
        clock: Dates operations, once for all of a step.
        num_operations_max: How many to keep, and at most a chunk of 1,024 more.
        num_block_ids_max: How many block ids those may name together.

    Attributes:
        on_operations: Called by ``flush`` when there are new operations; None while nobody wants
            to know. May be set on any thread.
        owners: Whose sequences are.
    """

    def __init__(
        self,
        inner: TraceSink,
        clock: Clock,
        *,
        num_operations_max: int = NUM_OPERATIONS_DEFAULT,
        num_block_ids_max: int = NUM_BLOCK_IDS_DEFAULT,
    ) -> None:
        self.on_operations: Callable[[], None] | None = None
        self.owners = SequenceOwners(num_operations_max)
        self._inner = inner
        self._pass_on = inner.kv
        self._clock = clock
        self._num_operations_max = num_operations_max
        self._num_block_ids_max = num_block_ids_max
        self._words: list[int] = []
        self._ids: list[int] = []
        self._extend_words = self._words.extend
        self._extend_ids = self._ids.extend
        self._num_sealed = 0
        # Up to which operation it was which time; only for those that are pending.
        self._dated_numbers: list[int] = []
        self._dates_ns: list[int] = []
        self._num_words_dated = 0
        self._has_sealed = False
        self._chunks: tuple[OperationChunk, ...] = ()
        self._num_ids_kept = 0
        # What readers see: the chunks, and what was pending when `publish` was called, in pieces.
        # Replaced as a whole, so they need no lock.
        self._published: tuple[OperationChunk, ...] = ()
        self._num_shown = 0
        self._num_ids_shown = 0
        # By block id: the number of the last operation, 0 for none; and, once that is in no chunk
        # any more, its time and words.
        self._last_numbers: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._last_times_ns: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._last_words: NDArray[np.uint64] = np.zeros((0, NUM_WORDS), dtype=np.uint64)

    @property
    def num_operations(self) -> int:
        """Number of the last operation; 0 before the first."""
        return self._num_sealed + len(self._words) // NUM_WORDS

    def sequence_begin(
        self, sequence_id: int, *, trace_id: bytes, span_id: bytes, request_id: str, tenant: str
    ) -> None:
        """Know whose the sequence is, and pass it on."""
        owner = SequenceOwner(tenant, request_id, self._clock.now_ns(), self.num_operations + 1)
        self.owners.begin(sequence_id, owner)
        self._inner.sequence_begin(
            sequence_id, trace_id=trace_id, span_id=span_id, request_id=request_id, tenant=tenant
        )

    def sequence_end(self, sequence_id: int) -> None:
        """Pass it on; whose it was stays known while operations of it are kept."""
        self.owners.end(sequence_id, self.num_operations)
        self._inner.sequence_end(sequence_id)

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
        """Count one operation, keep it and pass it on; see ``core.trace.TraceSink``.

        This is the hot path: its own part is two list extensions, and every 1,024th time a chunk.
        """
        num_block_ids = len(block_ids)
        if target_ids or num_block_ids > _NUM_IDS_FEW:
            self._kv_in_parts(
                operation,
                cause,
                sequence_id=sequence_id,
                generation=generation,
                position=position,
                step=step,
                block_ids=block_ids,
                target_ids=target_ids,
                num_free_after=num_free_after,
            )
            return
        self._pass_on(
            operation,
            cause,
            sequence_id=sequence_id,
            generation=generation,
            position=position,
            step=step,
            block_ids=block_ids,
            num_free_after=num_free_after,
        )
        self._extend_words((operation, cause, sequence_id, step, num_block_ids, 0))
        self._extend_ids(block_ids)
        if len(self._words) >= _NUM_PENDING_WORDS_MAX:
            self._seal()

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
        """Pass a finished span on."""
        self._inner.span(
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

    def flush(self) -> None:
        """Date what came since the last call, and show it to those who watch.

        To be called when a step is launched and whenever the recording thread is done with a step
        or a command. Costs next to nothing when nothing came or nobody watches.
        """
        num_words = len(self._words)
        if num_words == self._num_words_dated and not self._has_sealed:
            return
        self._has_sealed = False
        self._num_words_dated = num_words
        self._dated_numbers.append(self.num_operations)
        self._dates_ns.append(self._clock.now_ns())
        on_operations = self.on_operations
        if on_operations is not None:
            self.publish()
            on_operations()

    def publish(self) -> None:
        """Let ``read`` see everything up to now, also what is not in a chunk yet."""
        if self._num_shown < self.num_operations:
            self._published = (*self._published, self._pack_from(self._num_shown))
            self._num_shown = self.num_operations
            self._num_ids_shown = len(self._ids)

    def read(
        self, first_number: int, *, num_operations_max: int = 4096, num_ids_max: int = 262_144
    ) -> OperationBatch:
        """Published operations from ``first_number`` on; may be called on any thread.

        Empty when there are none yet. One operation comes whatever its number of ids.
        """
        chunks = self._published
        if not chunks:
            return OperationBatch([])
        num_lost = max(0, chunks[0].first_number - first_number)
        number = first_number + num_lost
        index = self._chunk_index(number, chunks)
        operations: list[OperationRecord] = []
        num_ids = 0
        for chunk in chunks[index:]:
            start = number - chunk.first_number
            room, room_ids = num_operations_max - len(operations), num_ids_max - num_ids
            is_here = 0 <= start < len(chunk.words)
            if not is_here or room <= 0 or room_ids <= 0:
                break
            found = chunk.records(start, room, room_ids)
            operations += found
            num_ids += sum(len(it.block_ids) + len(it.target_ids) for it in found)
            number += len(found)
        return OperationBatch(operations, num_lost)

    def last_operation(self, block_id: int) -> LastOperation | None:
        """The last operation on a block; None when there was none."""
        if self._words:
            pending = self._pack_from(self._num_sealed)
            blocks, indices = pending.touches()
            found = indices[blocks == block_id]
            if len(found):
                return pending.operation_at(int(found[-1]))
        number = int(self._last_numbers[block_id]) if block_id < len(self._last_numbers) else 0
        if not number:
            return None
        if number >= self._chunks[0].first_number:
            chunk = self._chunks[self._chunk_index(number, self._chunks)]
            return chunk.operation_at(number - chunk.first_number)
        words = self._last_words[block_id].tolist()
        return last_operation(number, int(self._last_times_ns[block_id]), words)

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
        """Record an operation on many blocks, as several when it would be too long for a reader.

        Cut here, so that the sink behind this one does not cut it otherwise and counts the same.
        """
        num_ids = len(block_ids) + len(target_ids)
        is_long = num_ids > NUM_IDS_PER_OPERATION_MAX
        num_ids_in_part = NUM_IDS_PER_OPERATION_MAX // 2 if is_long else num_ids
        for start in range(0, max(len(block_ids), len(target_ids)), num_ids_in_part):
            blocks = block_ids[start : start + num_ids_in_part]
            targets = target_ids[start : start + num_ids_in_part]
            self._pass_on(
                operation,
                cause,
                sequence_id=sequence_id,
                generation=generation,
                position=position,
                step=step,
                block_ids=blocks,
                target_ids=targets,
                num_free_after=num_free_after,
            )
            self._extend_words((operation, cause, sequence_id, step, len(blocks), len(targets)))
            self._extend_ids(blocks)
            self._extend_ids(targets)
            is_full = len(self._ids) >= _NUM_PENDING_IDS_MAX
            if is_full or len(self._words) >= _NUM_PENDING_WORDS_MAX:
                self._seal()

    def _seal(self) -> None:
        """Make a chunk of what is pending, and drop the oldest that are too many now."""
        chunk = self._pack_from(self._num_sealed)
        self._note_last(chunk)
        self._num_sealed = self._num_shown = self.num_operations
        self._num_ids_kept += len(chunk.ids)
        self._words.clear()
        self._ids.clear()
        self._dated_numbers.clear()
        self._dates_ns.clear()
        self._num_words_dated = self._num_ids_shown = 0
        self._has_sealed = True
        chunks = (*self._chunks, chunk)
        num_dropped = 0
        oldest_needed = self._num_sealed - self._num_operations_max
        for oldest in chunks[:-1]:
            is_needed = oldest.first_number + len(oldest.words) - 1 > oldest_needed
            if is_needed and self._num_ids_kept <= self._num_block_ids_max:
                break
            num_dropped += 1
            self._num_ids_kept -= len(oldest.ids)
            self._save_last(oldest)
        self._chunks = self._published = chunks[num_dropped:]
        self.owners.forget_before(self._chunks[0].first_number)

    def _pack_from(self, num_before: int) -> OperationChunk:
        """What is pending behind the first ``num_before`` operations of all."""
        words, ids = self._words, self._ids
        if num_before > self._num_sealed:
            words = words[(num_before - self._num_sealed) * NUM_WORDS :]
            ids = ids[self._num_ids_shown :]
        index = bisect.bisect_right(self._dated_numbers, num_before)
        numbers = [*self._dated_numbers[index:], self.num_operations]
        dates_ns = [*self._dates_ns[index:], self._clock.now_ns()]
        counts = [
            last - first for first, last in zip([num_before, *numbers], numbers, strict=False)
        ]
        times_ns = np.repeat(np.array(dates_ns), counts)
        return pack_chunk(num_before + 1, words, ids, times_ns)

    def _note_last(self, chunk: OperationChunk) -> None:
        """Note for each block the last operation on it; of two in one chunk the later."""
        blocks, indices = chunk.touches()
        if not len(blocks):
            return
        num_blocks = int(blocks.max()) + 1
        if num_blocks > len(self._last_numbers):
            num_more = max(num_blocks, 2 * len(self._last_numbers)) - len(self._last_numbers)
            self._last_numbers = np.pad(self._last_numbers, (0, num_more))
            self._last_times_ns = np.pad(self._last_times_ns, (0, num_more))
            self._last_words = np.pad(self._last_words, ((0, num_more), (0, 0)))
        self._last_numbers[blocks] = chunk.first_number + indices

    def _save_last(self, chunk: OperationChunk) -> None:
        """Copy from a chunk that is dropped what is still the last operation on some block."""
        blocks, indices = chunk.touches()
        is_last = self._last_numbers[blocks] == chunk.first_number + indices
        blocks, indices = blocks[is_last], indices[is_last]
        self._last_times_ns[blocks] = chunk.times_ns[indices]
        self._last_words[blocks] = chunk.words[indices]

    def _chunk_index(self, number: int, chunks: tuple[OperationChunk, ...]) -> int:
        """Where the operation is, or would be."""
        return bisect.bisect_right(chunks, number, key=_first_number_of) - 1


def _first_number_of(chunk: OperationChunk) -> int:
    return chunk.first_number
