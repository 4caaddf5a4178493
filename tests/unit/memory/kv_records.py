"""A trace sink that keeps records, and a replay that rebuilds a pool from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pageframe.core.trace import KvCause, KvOperation, NullTraceSink
from pageframe.executor.memory.block_pool import BlockPool, BlockState


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
        assert not target_ids
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

    def __post_init__(self) -> None:
        self.states = [BlockState.FREE] * self.num_blocks
        self.references = [0] * self.num_blocks
        self.num_replayed = 0

    def replay(self, records: list[KvRecord]) -> None:
        for record in records[self.num_replayed :]:
            self._replay_one(record)
            assert self.states.count(BlockState.FREE) == record.num_free_after, record
        self.num_replayed = len(records)

    def _replay_one(self, record: KvRecord) -> None:
        for block_id in record.block_ids:
            state = self.states[block_id]
            match record.operation:
                case KvOperation.ALLOCATE:
                    assert state is BlockState.FREE, record
                    self.states[block_id], self.references[block_id] = BlockState.HELD, 1
                case KvOperation.SHARE:
                    assert state is BlockState.HELD, record
                    self.references[block_id] += 1
                case KvOperation.RELEASE:
                    assert state is BlockState.HELD, record
                    self.references[block_id] -= 1
                    if not self.references[block_id]:
                        self.states[block_id] = BlockState.FENCED
                case KvOperation.FENCE_CLEAR:
                    assert state is BlockState.FENCED, record
                case KvOperation.FREE:
                    assert state is BlockState.FENCED, record
                    self.states[block_id] = BlockState.FREE
                case KvOperation.QUARANTINE:
                    self.states[block_id] = BlockState.QUARANTINED
                    self.references[block_id] = 0
                case _:
                    raise AssertionError(record)

    def assert_equals(self, pool: BlockPool) -> None:
        assert np.array_equal(pool.states, np.array(self.states, dtype=np.uint8))
        assert np.array_equal(pool.ref_counts, np.array(self.references, dtype=np.int32))
