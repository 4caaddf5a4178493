"""The block pool against a model of ten lines: a dictionary of references and a list that waits."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pageframe.core.trace import KvCause
from pageframe.executor.memory.block_columns import BlockNotHeldError
from pageframe.executor.memory.block_supply import BlocksExhaustedError
from pageframe.executor.memory.purpose import Purpose
from unit.memory.kv_records import RecordingSink, ReplayedPool
from unit.memory.memories import new_pool

NUM_BLOCKS = 9
PREFILL = Purpose(KvCause.PREFILL, sequence_id=1)
FINISHED = Purpose(KvCause.FINISHED, sequence_id=1)


class PoolMachine(RuleBasedStateMachine):
    """Allocate, share, release, launch and complete in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = RecordingSink()
        self.pool = new_pool(NUM_BLOCKS, self.sink)
        self.replayed = ReplayedPool(NUM_BLOCKS)
        self.references: dict[int, int] = {}
        self.waiting: list[tuple[int, int]] = []  # Ticket and block.
        self.launched = self.completed = 0

    @property
    def num_free(self) -> int:
        return NUM_BLOCKS - len(self.references) - len(self.waiting)

    def held(self, data: st.DataObject) -> np.ndarray:
        chosen = data.draw(st.sets(st.sampled_from(sorted(self.references)), min_size=1))
        return np.array(sorted(chosen), dtype=np.int32)

    @rule(num_blocks=st.integers(0, NUM_BLOCKS))
    def allocate(self, num_blocks: int) -> None:
        if num_blocks > self.num_free:
            with pytest.raises(BlocksExhaustedError):
                self.pool.allocate(num_blocks, PREFILL)
            return
        block_ids = self.pool.allocate(num_blocks, PREFILL).tolist()
        assert len(set(block_ids)) == num_blocks
        assert not self.references.keys() & set(block_ids)
        assert not {block_id for _, block_id in self.waiting} & set(block_ids)
        self.references.update(dict.fromkeys(block_ids, 1))

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        block_ids = self.held(data)
        self.pool.acquire(block_ids, PREFILL)
        for block_id in block_ids.tolist():
            self.references[block_id] += 1

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_ids = self.held(data)
        num_dropped = self.pool.release(block_ids, FINISHED)
        dropped = [b for b in block_ids.tolist() if self.references[b] == 1]
        assert num_dropped == len(dropped)
        for block_id in block_ids.tolist():
            self.references[block_id] -= 1
        for block_id in dropped:
            del self.references[block_id]
            if self.completed < self.launched:
                self.waiting.append((self.launched, block_id))

    @rule(block_id=st.integers(0, NUM_BLOCKS - 1))
    def release_what_nobody_holds(self, block_id: int) -> None:
        if block_id not in self.references:
            with pytest.raises(BlockNotHeldError):
                self.pool.release(np.array([block_id], dtype=np.int32), FINISHED)

    @rule()
    def launch(self) -> None:
        self.launched += 1
        self.pool.launch(self.launched)

    @precondition(lambda self: self.completed < self.launched)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        self.completed = data.draw(st.integers(self.completed + 1, self.launched))
        self.pool.complete(self.completed)
        self.waiting = [entry for entry in self.waiting if entry[0] > self.completed]

    @invariant()
    def counts_agree_with_the_model(self) -> None:
        account = self.pool.account()
        assert account.is_conserved
        assert (account.free, account.held) == (self.num_free, len(self.references))
        assert account.fenced == len(self.waiting)
        references = [self.references.get(block_id, 0) for block_id in range(NUM_BLOCKS)]
        assert self.pool.columns.ref_counts.tolist() == references

    @invariant()
    def the_trace_rebuilds_the_pool(self) -> None:
        self.replayed.replay(self.sink.records)
        self.replayed.assert_equals(self.pool)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, print_blob=True
)
