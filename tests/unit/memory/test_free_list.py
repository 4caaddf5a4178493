import numpy as np
import pytest

from pageframe.executor.memory.free_list import FreeList


def ids(*block_ids: int) -> np.ndarray:
    return np.array(block_ids, dtype=np.int32)


def test_a_new_list_hands_out_blocks_from_zero():
    free = FreeList(4)
    assert free.pop(3).tolist() == [0, 1, 2]
    assert len(free) == 1


def test_the_block_given_back_last_is_taken_first():
    free = FreeList(4)
    free.pop(4)
    free.push(ids(2, 0))
    free.push(ids(3))
    assert free.pop(2).tolist() == [3, 0]
    assert free.block_ids().tolist() == [2]


def test_taking_nothing_changes_nothing():
    free = FreeList(2)
    assert free.pop(0).tolist() == []
    assert len(free) == 2


def test_taken_ids_do_not_change_when_the_list_does():
    free = FreeList(3)
    taken = free.pop(2)
    free.push(ids(1, 0))
    assert taken.tolist() == [0, 1]


def test_taking_more_than_is_there_is_our_bug():
    with pytest.raises(AssertionError, match="3 of 2"):
        FreeList(2).pop(3)


def test_giving_back_more_than_exist_is_our_bug():
    with pytest.raises(AssertionError, match="3 free blocks of 2"):
        FreeList(2).push(ids(0))


def test_discard_takes_a_block_off_in_the_middle_and_every_copy_of_it():
    free = FreeList(5)
    free.pop(2)
    free.push(ids(3))
    free.discard(ids(3))
    assert free.block_ids().tolist() == [4, 2]
