import numpy as np
import pytest

from pageframe.core.step import PoolAccount
from pageframe.executor.memory.block_columns import BlockState
from pageframe.executor.memory.integrity import NO_BLOCK, ViolationKind, check_integrity
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
