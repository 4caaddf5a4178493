import numpy as np
import pytest

from pageframe.core.replica import PoolAccount
from pageframe.core.trace import KvCause
from pageframe.executor.memory.block_columns import (
    BlockNotHeldError,
    BlockState,
    UnknownBlockError,
)
from pageframe.executor.memory.block_pool import BlockPool
from pageframe.executor.memory.block_supply import BlocksExhaustedError
from pageframe.executor.memory.pool_upkeep import quarantine
from pageframe.executor.memory.purpose import Purpose
from unit.memory.kv_records import RecordingSink, ReplayedPool
from unit.memory.memories import new_pool

PREFILL = Purpose(KvCause.PREFILL, sequence_id=7, generation=1, position=32)
FINISHED = Purpose(KvCause.FINISHED, sequence_id=7, generation=1, position=40)


def ids(*block_ids: int) -> np.ndarray:
    return np.array(block_ids, dtype=np.int32)


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()


@pytest.fixture
def pool(sink) -> BlockPool:
    return new_pool(4, sink)


def test_a_block_goes_from_free_to_held_to_free_when_no_step_is_in_flight(pool, sink):
    assert pool.allocate(2, PREFILL).tolist() == [0, 1]
    assert pool.account() == PoolAccount(total=4, free=2, held=2)
    assert pool.release(ids(0, 1), FINISHED) == 2
    assert pool.account() == PoolAccount(total=4, free=4)
    assert sink.brief() == [
        ("ALLOCATE", "PREFILL", (0, 1)),
        ("RELEASE", "FINISHED", (0, 1)),
        ("FREE", "FINISHED", (0, 1)),
    ]


def test_blocks_released_under_a_running_step_wait_for_it(pool, sink):
    pool.allocate(3, PREFILL)
    pool.launch(1)
    pool.release(ids(1), FINISHED)
    pool.launch(2)
    pool.release(ids(2), FINISHED)
    assert pool.account() == PoolAccount(total=4, free=1, held=1, fenced=2)
    pool.complete(1)
    assert pool.account() == PoolAccount(total=4, free=2, held=1, fenced=1)
    pool.complete(2)
    assert pool.account() == PoolAccount(total=4, free=3, held=1)
    assert sink.brief() == [
        ("ALLOCATE", "PREFILL", (0, 1, 2)),
        ("RELEASE", "FINISHED", (1,)),
        ("RELEASE", "FINISHED", (2,)),
        ("FENCE_CLEAR", "STEP_COMPLETED", (1,)),
        ("FREE", "FINISHED", (1,)),
        ("FENCE_CLEAR", "STEP_COMPLETED", (2,)),
        ("FREE", "FINISHED", (2,)),
    ]


def test_a_shared_block_is_free_only_after_its_last_reference(pool, sink):
    pool.allocate(1, PREFILL)
    pool.acquire(ids(0), PREFILL)
    assert pool.release(ids(0), FINISHED) == 0
    assert pool.account().held == 1
    assert pool.release(ids(0), FINISHED) == 1
    assert pool.account().free == 4
    assert [operation for operation, _, _ in sink.brief()] == [
        "ALLOCATE",
        "SHARE",
        "RELEASE",
        "RELEASE",
        "FREE",
    ]


def test_allocate_each_gives_every_sequence_a_block_and_a_record_of_its_own(pool, sink):
    block_ids = pool.allocate_each(
        np.array([5, 6]), ids(0, 3), ids(16, 48), ids(0, 0), KvCause.DECODE
    )
    assert block_ids.tolist() == [0, 1]
    first, second = sink.records
    assert (first.sequence_id, first.generation, first.position) == (5, 0, 16)
    assert (first.block_ids, first.num_free_after) == ((0,), 3)
    assert (second.sequence_id, second.generation, second.position) == (6, 3, 48)
    assert (second.block_ids, second.num_free_after) == ((1,), 2)
    assert pool.explain(1).sequence_id == 6


def test_a_record_names_step_sequence_and_position(pool, sink):
    pool.current_step = 9
    pool.allocate(1, PREFILL)
    (record,) = sink.records
    assert (record.step, record.sequence_id, record.generation, record.position) == (9, 7, 1, 32)
    assert record.num_free_after == 3


def test_more_than_is_free_is_refused_with_the_numbers(pool):
    pool.allocate(3, PREFILL)
    with pytest.raises(BlocksExhaustedError) as caught:
        pool.allocate(2, PREFILL)
    assert caught.value.limits == {"num_blocks": "2", "num_available": "1"}
    assert pool.account() == PoolAccount(total=4, free=1, held=3)


def test_a_double_free_is_refused_and_changes_nothing(pool, sink):
    pool.allocate(2, PREFILL)
    pool.release(ids(0), FINISHED)
    sink.records.clear()
    with pytest.raises(BlockNotHeldError, match=r"\[0\] have no reference"):
        pool.release(ids(1, 0), FINISHED)
    assert pool.account() == PoolAccount(total=4, free=3, held=1)
    assert sink.records == []


def test_a_block_named_twice_in_one_release_is_refused(pool):
    pool.allocate(1, PREFILL)
    with pytest.raises(BlockNotHeldError):
        pool.release(ids(0, 0), FINISHED)
    assert pool.columns.ref_counts.tolist() == [1, 0, 0, 0]


def test_a_free_block_cannot_be_shared(pool):
    with pytest.raises(BlockNotHeldError):
        pool.acquire(ids(2), PREFILL)


@pytest.mark.parametrize("block_id", [-1, 4])
def test_a_block_outside_the_pool_is_refused(pool, block_id):
    with pytest.raises(UnknownBlockError):
        pool.release(ids(block_id), FINISHED)
    with pytest.raises(UnknownBlockError):
        pool.explain(block_id)


def test_explain_tells_who_has_a_block_why_and_since_when(pool):
    pool.current_step = 3
    pool.allocate(2, PREFILL)
    facts = pool.explain(1)
    assert (facts.state, facts.num_references, facts.sequence_id) == (BlockState.HELD, 1, 7)
    assert (facts.cause, facts.since_step) == (KvCause.PREFILL, 3)
    pool.launch(4)
    pool.current_step = 4
    pool.release(ids(1), FINISHED)
    facts = pool.explain(1)
    assert (facts.state, facts.num_references, facts.sequence_id) == (BlockState.FENCED, 0, 7)
    assert (facts.cause, facts.since_step) == (KvCause.FINISHED, 4)
    pool.complete(4)
    assert (pool.explain(1).state, pool.explain(1).sequence_id) == (BlockState.FREE, 0)
    assert pool.explain(3).cause is None


@pytest.mark.parametrize("state", ["free", "held", "fenced"])
def test_quarantine_takes_a_block_out_of_any_state_for_good(pool, sink, state):
    if state != "free":
        pool.allocate(1, PREFILL)
    pool.launch(1)
    if state == "fenced":
        pool.release(ids(0), FINISHED)
    quarantine(pool, ids(0), Purpose(KvCause.INTEGRITY))
    quarantine(pool, ids(0), Purpose(KvCause.INTEGRITY))
    pool.complete(1)
    assert pool.account() == PoolAccount(total=4, free=3, quarantined=1)
    assert pool.allocate(3, PREFILL).tolist() == [1, 2, 3]
    replayed = ReplayedPool(4)
    replayed.replay(sink.records)
    replayed.assert_equals(pool)


def test_steps_are_launched_and_completed_in_order(pool):
    pool.launch(2)
    with pytest.raises(AssertionError):
        pool.launch(2)
    with pytest.raises(AssertionError):
        pool.complete(3)
    with pytest.raises(AssertionError, match="step 2 in flight"):
        pool.restart()
    pool.complete(2)
    pool.restart()
    pool.launch(1)
