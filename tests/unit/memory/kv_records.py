"""A trace sink that keeps records, and a replay that rebuilds a pool from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pageframe.core.trace import KvCause, KvOperation, NullTraceSink
from pageframe.executor.memory.block_columns import ABSENT, BlockState
from pageframe.executor.memory.block_pool import BlockPool


@dataclass(frozen=True, slots=True)
class KvRecord:
    operation: KvOperation
    cause: KvCause
    sequence_id: int
    generation: int
    position: int
    step: int
    block_ids: tuple[int, ...]
    num_free_after: int
    target_ids: tuple[int, ...] = ()


@dataclass
class RecordingSink(NullTraceSink):
    records: list[KvRecord] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    def sequence_begin(self, sequence_id, *, trace_id, span_id, request_id, tenant) -> None:
        self.begun.append(sequence_id)

    def sequence_end(self, sequence_id) -> None:
        self.ended.append(sequence_id)

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
        self.records.append(
            KvRecord(
                operation,
                cause,
                sequence_id,
                generation,
                position,
                step,
                tuple(block_ids),
                num_free_after,
                tuple(target_ids),
            )
        )

    def brief(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Operation, cause and blocks of each record since the last call."""
        brief = [(r.operation.name, r.cause.name, r.block_ids) for r in self.records]
        self.records.clear()
        return brief


@dataclass
class ReplayedPool:
    """What a reader of the trace knows about a pool, from the records alone."""

    num_blocks: int
    num_blocks_max: int = 0

    def __post_init__(self) -> None:
        num_absent = max(0, self.num_blocks_max - self.num_blocks)
        self.states = [BlockState.FREE] * self.num_blocks + [ABSENT] * num_absent
        self.references = [0] * len(self.states)
        self.pins = [0] * len(self.states)
        self.is_indexed = [False] * len(self.states)
        self.num_replayed = 0

    def replay(self, records: list[KvRecord]) -> None:
        for record in records[self.num_replayed :]:
            self._replay_one(record)
            assert self.states.count(BlockState.FREE) == record.num_free_after, record
        self.num_replayed = len(records)

    def _replay_one(self, record: KvRecord) -> None:
        if record.operation is KvOperation.MOVE:
            for source, target in zip(record.block_ids, record.target_ids, strict=True):
                self._move(source, target)
            return
        if record.operation is KvOperation.RESIZE:
            for block_id in record.block_ids:
                assert self.states[block_id] in (BlockState.FREE, BlockState.QUARANTINED), record
                self.states[block_id] = ABSENT
            for block_id in record.target_ids:
                assert self.states[block_id] == ABSENT, record
                self.states[block_id] = BlockState.FREE
            return
        if record.operation in _CONTENT_ONLY:
            return
        for block_id in record.block_ids:
            self._change(record, block_id)

    def _change(self, record: KvRecord, block_id: int) -> None:
        state = self.states[block_id]
        match record.operation:
            case KvOperation.ALLOCATE:
                assert state is BlockState.FREE, record
                self.states[block_id], self.references[block_id] = BlockState.HELD, 1
            case KvOperation.SHARE | KvOperation.PIN:
                assert state in (BlockState.HELD, BlockState.CACHED), record
                self.states[block_id] = BlockState.HELD
                self.references[block_id] += 1
                self.pins[block_id] += record.operation is KvOperation.PIN
            case KvOperation.RELEASE | KvOperation.UNPIN:
                assert state is BlockState.HELD, record
                self.references[block_id] -= 1
                self.pins[block_id] -= record.operation is KvOperation.UNPIN
                if not self.references[block_id]:
                    is_indexed = self.is_indexed[block_id]
                    self.states[block_id] = BlockState.CACHED if is_indexed else BlockState.FENCED
            case KvOperation.INDEX:
                assert state is BlockState.HELD, record
                assert not self.is_indexed[block_id], record
                self.is_indexed[block_id] = True
            case KvOperation.UNINDEX:
                assert state is BlockState.HELD, record
                assert self.is_indexed[block_id], record
                self.is_indexed[block_id] = False
            case KvOperation.EVICT:
                assert state is BlockState.CACHED, record
                self.states[block_id], self.is_indexed[block_id] = BlockState.FENCED, False
            case KvOperation.FENCE_CLEAR:
                assert state is BlockState.FENCED, record
            case KvOperation.FREE:
                assert state is BlockState.FENCED, record
                self.states[block_id] = BlockState.FREE
            case KvOperation.QUARANTINE:
                self.states[block_id], self.is_indexed[block_id] = BlockState.QUARANTINED, False
                self.references[block_id] = self.pins[block_id] = 0
            case _:
                raise AssertionError(record)

    def _move(self, source: int, target: int) -> None:
        assert self.states[target] is BlockState.FREE, (source, target)
        for column, empty in (
            (self.states, BlockState.FREE),
            (self.references, 0),
            (self.pins, 0),
            (self.is_indexed, False),
        ):
            column[target], column[source] = column[source], empty

    def assert_equals(self, pool: BlockPool) -> None:
        columns = pool.columns
        assert columns.states.tolist() == [int(state) for state in self.states]
        assert columns.ref_counts.tolist() == self.references
        assert columns.pin_counts.tolist() == self.pins
        assert pool.index.is_indexed.tolist() == self.is_indexed


_CONTENT_ONLY = {
    KvOperation.COPY_ON_WRITE,
    KvOperation.DEMOTE,
    KvOperation.PROMOTE,
    KvOperation.SWAP_OUT,
    KvOperation.SWAP_IN,
}
"""What they do to references is recorded by operations of its own."""
