"""Spare blocks: the free list, the cache, and the fence between them and their next owner."""

import numpy as np
import pytest

from pageframe.core.trace import KvCause
from pageframe.executor.memory.block_columns import ABSENT, BlockColumns, BlockState
from pageframe.executor.memory.block_supply import BlocksExhaustedError, BlockSupply
from pageframe.executor.memory.eviction import LruEviction
from pageframe.executor.memory.prefix_index import PrefixIndex
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.recorder import OperationRecorder
from unit.memory.kv_records import RecordingSink

PREFILL = Purpose(KvCause.PREFILL, sequence_id=7, tenant_id=1)
FINISHED = Purpose(KvCause.FINISHED, sequence_id=7)


def ids(*block_ids: int) -> np.ndarray:
    return np.array(block_ids, dtype=np.int32)


class House:
    """A supply of a few blocks with everything around it."""

    def __init__(self, num_blocks: int = 4, num_blocks_max: int = 6) -> None:
        self.sink = RecordingSink()
        self.columns = BlockColumns(num_blocks, num_blocks_max)
        self.index = PrefixIndex(num_blocks_max, 4)
        recorder = OperationRecorder(self.sink, lambda: self.supply.num_free)
        self.supply = BlockSupply(num_blocks, self.columns, self.index, LruEviction(), recorder)

    def take(self, num_blocks: int) -> list[int]:
        return self.supply.take(num_blocks, 1, PREFILL).tolist()

    def cache(self, *block_ids: int) -> None:
        """Let held blocks be cached as one chain."""
        for depth, block_id in enumerate(block_ids):
            key = bytes([block_id + 1]) * 32
            assert self.index.add(block_id, key, bytes(32), b"")
            self.columns.depths[block_id] = depth
        self.columns.ref_counts[list(block_ids)] = 0
        self.supply.cache(ids(*block_ids))

    def let_go(self, *block_ids: int) -> None:
        """Drop held blocks that cannot be found."""
        self.columns.ref_counts[list(block_ids)] = 0
        self.supply.fence_off(ids(*block_ids), BlockState.HELD, FINISHED)

    def states(self) -> str:
        """A letter for each block, ``x`` for one behind the fence."""
        letters = {ABSENT: "-"} | {state: state.name[0].lower() for state in BlockState}
        letters[BlockState.FENCED] = "x"
        return "".join(letters[state] for state in self.columns.states.tolist())


def test_free_blocks_are_taken_before_anything_is_evicted():
    house = House()
    assert house.take(2) == [0, 1]
    house.cache(0, 1)
    assert house.take(2) == [2, 3]
    assert house.states() == "cchh--"
    assert house.supply.evictable_ids() == [1, 0]


def test_what_the_free_list_lacks_is_evicted_tail_before_head():
    house = House()
    house.take(3)
    house.cache(0, 1, 2)
    house.sink.records.clear()
    assert sorted(house.take(2)) == [2, 3]
    assert house.sink.brief() == [
        ("EVICT", "POOL_PRESSURE", (2,)),
        ("FREE", "POOL_PRESSURE", (2,)),
    ]
    assert house.supply.evictable_ids() == [1, 0]
    assert house.index.key_of(2) is None
    assert house.index.key_of(1) is not None


def test_more_than_is_free_and_cached_is_refused_and_nothing_is_evicted():
    house = House()
    house.take(3)
    house.cache(1, 2)
    with pytest.raises(BlocksExhaustedError) as caught:
        house.take(4)
    assert caught.value.limits == {"num_blocks": "4", "num_available": "3"}
    assert house.states() == "hccf--"
    assert (house.supply.num_free, house.supply.num_available) == (1, 3)


def test_who_keeps_what_is_evicted_sees_it_while_it_can_still_be_found():
    house = House()
    house.take(4)
    house.cache(0, 1)
    seen = []

    def look(block_ids, purpose):
        keys = [house.index.key_of(block_id) for block_id in block_ids]
        seen.append((block_ids, purpose.sequence_id, purpose.cause.name, None in keys))

    house.supply.before_evict = look
    assert house.supply.evict(1, PREFILL._replace(cause=KvCause.RESIZE)) == 1
    assert seen == [([1], 7, "RESIZE", False)]


def test_evicting_more_than_there_is_gives_up_all_there_is():
    house = House()
    house.take(2)
    house.cache(0)
    assert house.supply.evict(5, PREFILL) == 1
    assert house.supply.evict(5, PREFILL) == 0
    assert house.states() == "fhff--"


def test_under_a_step_in_flight_evicted_blocks_wait_and_do_not_count_as_available():
    house = House()
    house.take(4)
    house.cache(0, 1)
    house.supply.launch(1)
    assert (house.supply.is_quiet, house.supply.num_available) == (False, 0)
    assert house.supply.evict(1, PREFILL) == 1
    assert (house.states(), house.supply.num_free) == ("cxhh--", 0)
    house.supply.complete(1)
    assert house.states() == "cfhh--"
    assert house.supply.num_available == 2


def test_the_fence_opens_for_what_was_given_up_before_a_step_that_has_finished():
    house = House()
    house.take(4)
    house.supply.launch(1)
    house.let_go(0)
    house.supply.launch(2)
    house.let_go(1)
    house.sink.records.clear()
    house.supply.complete(1)
    assert house.supply.fenced_ids().tolist() == [1]
    assert house.sink.brief() == [
        ("FENCE_CLEAR", "STEP_COMPLETED", (0,)),
        ("FREE", "FINISHED", (0,)),
    ]
    house.supply.complete(2)
    assert sorted(house.supply.free_ids().tolist()) == [0, 1]


def test_when_quiet_blocks_pass_the_fence_at_once_and_without_a_record_of_waiting():
    house = House()
    house.take(2)
    house.sink.records.clear()
    house.let_go(1)
    assert house.sink.brief() == [("FREE", "FINISHED", (1,))]
    assert house.supply.fenced_ids().tolist() == []


def test_a_block_that_is_taken_up_again_is_no_victim():
    house = House()
    house.take(3)
    house.cache(0, 1)
    house.supply.take_up(ids(1))
    house.columns.ref_counts[1] = 1
    assert house.supply.evictable_ids() == [0]
    assert house.states() == "chhf--"


def test_blocks_swap_places_with_the_lowest_free_ones_and_keep_what_is_known_of_them():
    house = House()
    house.take(4)
    house.cache(3)
    house.columns.owner_ids[2] = 42
    house.let_go(0, 1)
    assert house.supply.lowest_free(2, 2).tolist() == [0, 1]
    house.supply.swap_places(ids(2, 3), ids(0, 1))
    assert house.states() == "hcff--"
    assert house.supply.evictable_ids() == [1]
    assert house.columns.owner_ids[:4].tolist() == [42, 0, 0, 0]
    assert sorted(house.supply.free_ids().tolist()) == [2, 3]


def test_blocks_that_come_are_taken_first_and_in_order():
    house = House()
    house.supply.open(ids(4, 5))
    assert house.states() == "ffffff"
    assert house.take(3) == [4, 5, 0]


def test_blocks_that_leave_are_never_taken():
    house = House()
    house.supply.close(ids(2, 3))
    house.columns.recount()
    assert house.states() == "ff----"
    assert house.supply.num_free == 2
    house.take(1)
    with pytest.raises(AssertionError, match="in use"):
        house.supply.close(ids(0))


def test_lost_blocks_are_forgotten_wherever_they_wait():
    house = House()
    house.take(3)
    house.cache(0)
    house.supply.launch(1)
    house.let_go(1)
    house.supply.discard(ids(0, 1, 3))
    house.supply.complete(1)
    assert house.supply.free_ids().tolist() == []
    assert house.supply.evictable_ids() == []


def test_steps_are_launched_and_completed_in_order():
    house = House()
    house.supply.launch(3)
    for wrong in (lambda: house.supply.launch(3), lambda: house.supply.complete(4)):
        with pytest.raises(AssertionError):
            wrong()
    with pytest.raises(AssertionError, match="step 3 in flight"):
        house.supply.restart()
    house.supply.complete(3)
    house.supply.restart()
    house.supply.launch(1)
