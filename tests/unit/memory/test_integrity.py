import numpy as np
import pytest

from pageframe.core.plan import Recovery
from pageframe.core.replica import PoolAccount
from pageframe.executor.memory.block_columns import BlockState
from pageframe.executor.memory.integrity import NO_BLOCK, ViolationKind, check_integrity
from unit.executor.small_engine import SmallEngine, fork, request
from unit.memory.memories import Harness, announcement, entries


@pytest.fixture
def harness() -> Harness:
    """Sequence 1 holds blocks 0 and 1, sequence 2 holds block 2, five are free."""
    harness = Harness()
    harness.run(
        announce=[announcement(1, 7), announcement(2, 3)], may=entries((1, 0, 7), (2, 0, 3))
    )
    assert harness.memory.pool.account() == PoolAccount(total=8, free=5, held=3)
    return harness


def found(harness: Harness) -> list[tuple[ViolationKind, int, int, int]]:
    """What the check finds; afterwards nothing may be left to find."""
    violations = check_integrity(harness.memory)
    assert check_integrity(harness.memory) == []
    assert harness.memory.pool.account().is_conserved
    return [(v.kind, v.block_id, v.expected, v.actual) for v in violations]


def test_a_sound_memory_has_no_violation_and_stays_as_it_is(harness):
    before = harness.snapshot()
    assert check_integrity(harness.memory) == []
    assert harness.snapshot() == before


def test_a_lost_reference_is_found_with_the_sequence_that_holds_the_block(harness):
    harness.memory.pool.columns.ref_counts[1] = 0
    violations = check_integrity(harness.memory)
    assert {violation.kind for violation in violations} == {
        ViolationKind.REFERENCES,
        ViolationKind.STATE,
    }
    for violation in violations:
        assert (violation.block_id, violation.sequence_ids) == (1, (1,))
        assert violation.block.state is BlockState.HELD
        assert violation.block.sequence_id == 1
    assert harness.memory.pool.columns.states[1] == BlockState.QUARANTINED


def test_a_block_mapped_by_two_tables_with_one_reference_is_found(harness):
    harness.memory.tables.entries[harness.row(2), 0] = 0
    assert found(harness) == [
        (ViolationKind.REFERENCES, 0, 2, 1),
        (ViolationKind.REFERENCES, 2, 0, 1),
    ]
    assert harness.memory.pool.account() == PoolAccount(total=8, free=5, held=1, quarantined=2)


def test_a_held_block_on_the_free_list_is_found_and_never_handed_out(harness):
    harness.memory.pool.supply._free.push(np.array([2], dtype=np.int32))
    assert (ViolationKind.FREE_LIST, 2, 0, 1) in found(harness)
    assert 2 not in harness.memory.pool.supply.free_ids()


def test_a_block_twice_on_the_free_list_is_found(harness):
    harness.memory.pool.supply._free.push(np.array([7], dtype=np.int32))
    assert (ViolationKind.FREE_LIST, 7, 1, 2) in found(harness)
    assert harness.memory.pool.supply.free_ids().tolist() == [6, 5, 4, 3]


def test_a_leaked_block_is_found(harness):
    harness.memory.pool.supply._free.pop(1)
    assert (ViolationKind.FREE_LIST, 3, 1, 0) in found(harness)


def test_a_fenced_block_that_nothing_waits_for_is_found(harness):
    harness.memory.pool.launch(2)
    harness.run(finish=[2])
    harness.memory.pool.supply._fence.clear(2)
    assert found(harness) == [(ViolationKind.FENCE, 2, 1, 0)]


def test_a_running_count_that_drifted_is_found_and_set_right(harness):
    harness.memory.pool.columns.num_by_state[BlockState.HELD] += 1
    assert found(harness) == [(ViolationKind.COUNT, NO_BLOCK, 3, 4)]
    assert harness.memory.pool.account() == PoolAccount(total=8, free=5, held=3)


def test_a_sequence_with_a_block_in_quarantine_can_end_and_the_block_stays_out(harness):
    harness.memory.pool.columns.ref_counts[0] = 7
    assert found(harness) == [(ViolationKind.REFERENCES, 0, 1, 7)]
    harness.run(finish=[1, 2])
    assert harness.memory.pool.account() == PoolAccount(total=8, free=7, quarantined=1)
    assert check_integrity(harness.memory) == []


class TestSharedMemory:
    """Sequence 1 and its child share blocks 0 to 2; 3 and 4 are cached; 5 to 7 are free."""

    @pytest.fixture
    def small(self) -> SmallEngine:
        small = SmallEngine(num_host_slots=4)
        small.step(
            announce=[request(1, range(10, 20), tenant="t")],
            may=entries((1, 0, 64)),
            forks=[fork(1, 2)],
        )
        small.is_checked = False
        sequences = small.memory.sequences
        sequences.num_computed[sequences.running_rows()] = 10
        small.start(request(3, range(40, 48)))
        small.engine.cancel([3])
        assert small.engine.check_integrity() == []
        return small

    def found(self, small: SmallEngine) -> list[tuple[ViolationKind, int, int, int]]:
        violations = check_integrity(small.memory)
        assert check_integrity(small.memory) == []
        assert small.engine.account().is_conserved
        return [(v.kind, v.block_id, v.expected, v.actual) for v in violations]

    def test_a_reference_of_a_child_that_is_lost_is_found(self, small):
        small.memory.pool.columns.ref_counts[0] -= 1
        assert self.found(small) == [(ViolationKind.REFERENCES, 0, 2, 1)]

    def test_both_who_share_a_lost_block_are_named(self, small):
        small.memory.pool.columns.ref_counts[1] += 1
        (violation,) = check_integrity(small.memory)
        assert violation.sequence_ids == (1, 2)
        assert violation.block.tenant == "t"

    def test_a_cached_block_that_cannot_be_found_is_lost(self, small):
        (cached, *_) = small.cached_ids()
        small.memory.pool.index.remove(cached)
        assert self.found(small) == [(ViolationKind.INDEX, cached, 1, 0)]

    def test_a_free_block_that_can_be_found_is_lost(self, small):
        (free, *_) = small.free_ids()
        small.memory.pool.index.add(free, bytes(32), bytes(32), b"")
        assert self.found(small) == [(ViolationKind.INDEX, free, 0, 1)]

    def test_a_block_under_the_key_of_another_is_lost(self, small):
        small.memory.pool.index._keys[0] = small.memory.pool.index._keys[1]
        assert self.found(small) == [(ViolationKind.INDEX, 0, 1, 0)]

    def test_a_cached_block_that_nobody_would_evict_is_lost(self, small):
        (cached, *_) = small.cached_ids()
        small.memory.pool.supply._eviction.discard(cached)
        assert (ViolationKind.EVICTION, cached, 1, 0) in self.found(small)

    def test_a_held_block_that_would_be_evicted_is_lost(self, small):
        small.memory.pool.supply._eviction.insert([0], [0])
        assert (ViolationKind.EVICTION, 0, 0, 1) in self.found(small)

    def test_a_pin_that_nobody_knows_of_is_found(self, small):
        small.memory.pool.columns.pin_counts[0] += 1
        assert (ViolationKind.PINS, 0, 0, 1) in self.found(small)

    def test_a_pin_that_was_lost_is_found(self, small):
        small.desk.retain(
            tenant="t", cache_salt=b"", name="h", token_ids=range(10, 14), ttl_ns=9, now_ns=1
        )
        assert check_integrity(small.memory) == []
        small.memory.pool.columns.pin_counts[0] = 0
        kinds = [violation[:2] for violation in self.found(small)]
        assert (ViolationKind.PINS, 0) in kinds

    def test_a_tenant_that_is_charged_for_what_it_does_not_hold_is_found(self, small):
        small.memory.pool.columns.num_held_by_tenant[1] += 1
        assert self.found(small) == [(ViolationKind.COUNT, NO_BLOCK, 4, 5)]

    def test_a_host_slot_that_was_lost_is_found(self, small):
        small.memory.host._free_slots.pop()
        violations = [(v.kind, v.block_id) for v in check_integrity(small.memory)]
        assert violations == [(ViolationKind.HOST, NO_BLOCK)]

    def test_what_arrives_from_the_host_is_accounted_for(self, small):
        small.preempt(1, Recovery.SWAP)
        small.step()
        small.engine.cancel([2])
        small.start(request(5, range(60, 90)))
        small.engine.cancel([5])
        sequence = small.memory.sequences.get(1)
        match = small.memory.match(sequence)
        assert match.promotions
        small.memory.fetch(sequence, match)
        arriving = small.memory.transfers.arriving_ids()
        assert check_integrity(small.memory) == []
        small.memory.pool.columns.ref_counts[arriving[0]] += 1
        assert (ViolationKind.REFERENCES, arriving[0], 1, 2) in [
            (v.kind, v.block_id, v.expected, v.actual) for v in check_integrity(small.memory)
        ]

    def test_blocks_that_left_a_window_are_not_counted(self):
        small = SmallEngine(window_tokens=6)
        small.start(request(1, range(10, 20)))
        assert check_integrity(small.memory) == []
        small.memory.tables.first_block[small.memory.sequences.get(1).row] = 0
        assert (ViolationKind.REFERENCES, 0, 1, 0) in self.found(small)
