"""The prefix index on tiny pools: block size 4, literal block ids."""

import numpy as np
import pytest

from pageframe.executor.memory.block_keys import (
    BlockKey,
    chain_keys,
    chain_root,
    child_key,
    private_key,
    token_bytes,
)
from pageframe.executor.memory.prefix_index import (
    NO_BLOCK,
    NUM_CHILDREN_LOOKED_AT_MAX,
    PrefixIndex,
)

BLOCK_SIZE = 4
ROOT = chain_root(model="m", block_size=BLOCK_SIZE, salt=b"a")
OTHER_ROOT = chain_root(model="m", block_size=BLOCK_SIZE, salt=b"b")


def tokens(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, dtype=np.int32)


def make_index(num_blocks: int = 8) -> PrefixIndex:
    return PrefixIndex(num_blocks, BLOCK_SIZE)


def add_chain(
    index: PrefixIndex, block_ids: list[int], token_ids: np.ndarray, root: BlockKey = ROOT
) -> list[BlockKey]:
    """Index consecutive blocks that hold ``token_ids``; returns their keys."""
    keys = chain_keys(root, token_ids, BLOCK_SIZE)
    parents = [root, *keys[:-1]]
    for place, block_id in enumerate(block_ids):
        held = token_ids[place * BLOCK_SIZE : (place + 1) * BLOCK_SIZE]
        assert index.add(block_id, keys[place], parents[place], token_bytes(held))
    return keys


def assert_empty(index: PrefixIndex) -> None:
    assert len(index) == 0
    assert not index.is_indexed.any()
    assert [index.key_of(block_id) for block_id in range(len(index.is_indexed))] == (
        [None] * len(index.is_indexed)
    )
    assert index.match_inside(ROOT, tokens(1, 2, 3, 4)) == (NO_BLOCK, 0)


def test_a_new_index_finds_nothing():
    index = make_index()
    assert_empty(index)
    assert index.block_of(ROOT) == NO_BLOCK
    assert index.match([ROOT]) == []


def test_a_prompt_matches_as_far_as_it_agrees():
    index = make_index()
    add_chain(index, [5, 2, 7], tokens(*range(12)))
    asked = tokens(*range(8), 99, 9, 10, 11, 12, 13, 14, 15)
    assert index.match(chain_keys(ROOT, asked, BLOCK_SIZE)) == [5, 2]
    assert index.is_indexed.nonzero()[0].tolist() == [2, 5, 7]
    assert len(index) == 3


def test_a_match_ends_at_the_first_gap():
    index = make_index()
    keys = add_chain(index, [5, 2, 7], tokens(*range(12)))
    assert index.remove(2) == keys[1]
    assert index.match(keys) == [5]
    assert index.block_of(keys[2]) == 7


def test_a_match_of_no_keys_is_empty():
    index = make_index()
    add_chain(index, [0], tokens(0, 1, 2, 3))
    assert index.match([]) == []


def test_the_same_content_is_found_once():
    index = make_index()
    (key,) = add_chain(index, [3], tokens(0, 1, 2, 3))
    assert not index.add(4, key, ROOT, token_bytes(tokens(0, 1, 2, 3)))
    assert index.block_of(key) == 3
    assert index.key_of(4) is None
    assert not index.is_indexed[4]
    assert index.match_inside(ROOT, tokens(0, 1)) == (3, 2)
    assert len(index) == 1


def test_a_block_that_was_removed_can_be_used_for_other_content():
    index = make_index()
    add_chain(index, [3], tokens(0, 1, 2, 3))
    index.remove(3)
    assert_empty(index)
    (key,) = add_chain(index, [3], tokens(5, 6, 7, 8))
    assert index.match([key]) == [3]
    assert index.match_inside(ROOT, tokens(0, 1, 2, 3)) == (NO_BLOCK, 0)


def test_a_hit_never_crosses_salts():
    index = make_index()
    token_ids = tokens(*range(8))
    add_chain(index, [0, 1], token_ids)
    foreign = chain_keys(OTHER_ROOT, token_ids, BLOCK_SIZE)
    assert index.match(foreign) == []
    for parent in (OTHER_ROOT, *foreign):
        assert index.match_inside(parent, token_ids) == (NO_BLOCK, 0)
    add_chain(index, [6, 7], token_ids, root=OTHER_ROOT)
    assert index.match(foreign) == [6, 7]
    assert index.match_inside(ROOT, token_ids) == (0, 4)
    assert index.match_inside(OTHER_ROOT, token_ids) == (6, 4)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([], (NO_BLOCK, 0)),
        ([9], (NO_BLOCK, 0)),
        ([9, 1, 2, 3], (NO_BLOCK, 0)),
        ([0], (4, 1)),
        ([0, 1, 9], (4, 2)),
        ([0, 1, 2], (4, 3)),
        ([0, 1, 2, 9], (4, 3)),
        ([0, 1, 2, 3], (4, 4)),
        ([0, 1, 2, 3, 4, 5, 6, 7], (4, 4)),
    ],
)
def test_a_hit_may_end_inside_a_block(wanted, expected):
    index = make_index()
    add_chain(index, [4], tokens(0, 1, 2, 3))
    assert index.match_inside(ROOT, tokens(*wanted)) == expected


def test_tokens_are_compared_whole_and_not_by_the_byte():
    """256 and 65,536 share three bytes of four with 0."""
    index = make_index()
    add_chain(index, [4], tokens(256, 65_536, 2**31 - 1, -1))
    assert index.match_inside(ROOT, tokens(0, 65_536)) == (NO_BLOCK, 0)
    assert index.match_inside(ROOT, tokens(256, 0)) == (4, 1)
    assert index.match_inside(ROOT, tokens(256, 65_536, -1)) == (4, 2)
    assert index.match_inside(ROOT, tokens(256, 65_536, 2**31 - 1, -(2**31))) == (4, 3)
    assert index.match_inside(ROOT, tokens(256, 65_536, 2**31 - 1, -1)) == (4, 4)


def test_no_more_tokens_agree_than_were_asked_for():
    """A block that goes on with zeros is no longer match than the question."""
    index = make_index()
    add_chain(index, [4], tokens(7, 0, 0, 5))
    assert index.match_inside(ROOT, tokens(7)) == (4, 1)
    assert index.match_inside(ROOT, tokens(7, 0)) == (4, 2)


def test_the_child_that_agrees_most_is_found_whatever_its_age():
    index = make_index()
    add_chain(index, [0], tokens(1, 2, 3, 0))
    add_chain(index, [1], tokens(1, 2, 0, 0))
    add_chain(index, [2], tokens(1, 0, 0, 0))
    assert index.match_inside(ROOT, tokens(1, 2, 3, 4)) == (0, 3)
    assert index.match_inside(ROOT, tokens(1, 2, 9, 9)) == (1, 2)
    assert index.match_inside(ROOT, tokens(1, 9, 9, 9)) == (2, 1)


def test_of_equals_the_newest_child_is_found():
    index = make_index()
    for block_id in (3, 1, 2):
        add_chain(index, [block_id], tokens(1, 2, 3, 10 + block_id))
    assert index.match_inside(ROOT, tokens(1, 2, 3, 4)) == (2, 3)
    index.remove(2)
    assert index.match_inside(ROOT, tokens(1, 2, 3, 4)) == (1, 3)


def test_children_of_another_parent_are_not_looked_at():
    index = make_index()
    first, second = add_chain(index, [0, 1], tokens(1, 2, 3, 4, 5, 6, 7, 8))
    assert index.match_inside(first, tokens(5, 6, 9)) == (1, 2)
    assert index.match_inside(ROOT, tokens(5, 6, 9)) == (NO_BLOCK, 0)
    assert index.match_inside(second, tokens(5, 6, 9)) == (NO_BLOCK, 0)


def test_only_the_newest_sixteen_children_are_looked_at():
    assert NUM_CHILDREN_LOOKED_AT_MAX == 16
    index = make_index(17)
    for block_id in range(17):
        add_chain(index, [block_id], tokens(100 + block_id, 0, 0, 0))
    assert index.match_inside(ROOT, tokens(100, 0)) == (NO_BLOCK, 0)
    assert index.match_inside(ROOT, tokens(101, 0)) == (1, 2)
    index.remove(9)
    assert index.match_inside(ROOT, tokens(100, 0)) == (0, 2)


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_the_other_children_are_found_when_one_goes(removed):
    index = make_index()
    for block_id in range(3):
        add_chain(index, [block_id], tokens(block_id, 7, 7, 7))
    index.remove(removed)
    for block_id in range(3):
        expected = (NO_BLOCK, 0) if block_id == removed else (block_id, 4)
        assert index.match_inside(ROOT, tokens(block_id, 7, 7, 7)) == expected


def test_a_private_block_is_found_by_its_whole_key_only():
    index = make_index()
    (head,) = add_chain(index, [0], tokens(0, 1, 2, 3))
    key = private_key(0, 12, 1, 1)
    assert index.add(1, key, head, b"")
    assert index.match([head, key]) == [0, 1]
    assert index.match_inside(head, tokens(0, 0, 0, 0)) == (NO_BLOCK, 0)
    assert index.remove(1) == key
    assert index.block_of(key) == NO_BLOCK
    assert index.match([head]) == [0]


def test_private_blocks_leave_the_sixteen_places_to_others():
    index = make_index(20)
    add_chain(index, [19], tokens(0, 1, 2, 3))
    for block_id in range(18):
        assert index.add(block_id, private_key(0, block_id, 1, 0), ROOT, b"")
    assert index.match_inside(ROOT, tokens(0, 1)) == (19, 2)


def test_the_block_before_is_the_one_that_has_its_key_now():
    index = make_index()
    keys = add_chain(index, [5, 2], tokens(*range(8)))
    assert index.add(3, private_key(0, 1, 1, 2), keys[1], b"")
    assert [index.block_before(block_id) for block_id in (5, 2, 3)] == [NO_BLOCK, 5, 2]
    index.remove(5)
    assert index.block_before(2) == NO_BLOCK
    assert index.add(7, keys[0], ROOT, token_bytes(tokens(0, 1, 2, 3)))
    index.move(2, 6)
    assert [index.block_before(block_id) for block_id in (6, 3)] == [7, 6]


def test_content_that_moves_is_found_where_it_went():
    index = make_index()
    keys = add_chain(index, [5, 2], tokens(*range(8)))
    index.move(5, 0)
    assert index.match(keys) == [0, 2]
    assert index.key_of(0) == keys[0]
    assert index.key_of(5) is None
    assert index.is_indexed.nonzero()[0].tolist() == [0, 2]
    assert index.match_inside(ROOT, tokens(0, 1, 9)) == (0, 2)
    assert index.match_inside(keys[0], tokens(4, 9)) == (2, 1)
    assert len(index) == 2


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_child_that_moves_keeps_its_age(moved):
    """Removing the newest first uncovers the others in the order in which they came."""
    index = make_index()
    order = [0, 1, 2]
    for block_id in order:
        add_chain(index, [block_id], tokens(1, 2, 3, 10 + block_id))
    index.move(moved, 6)
    order[moved] = 6
    for block_id in reversed(order):
        assert index.match_inside(ROOT, tokens(1, 2, 3, 4)) == (block_id, 3)
        index.remove(block_id)
    assert_empty(index)


def test_a_private_block_moves_too():
    index = make_index()
    key = private_key(0, 12, 1, 1)
    assert index.add(1, key, ROOT, b"")
    index.move(1, 4)
    assert index.block_of(key) == 4
    assert index.remove(4) == key
    assert_empty(index)


def test_the_whole_index_can_be_emptied_in_any_order():
    index = make_index()
    add_chain(index, [0, 1, 2], tokens(*range(12)))
    add_chain(index, [3, 4], tokens(*range(20, 28)))
    assert index.add(5, private_key(0, 1, 1, 1), ROOT, b"")
    for block_id in (1, 3, 5, 0, 4, 2):
        index.remove(block_id)
    assert_empty(index)


def test_a_second_key_for_a_block_is_our_bug():
    index = make_index()
    add_chain(index, [3], tokens(0, 1, 2, 3))
    with pytest.raises(AssertionError, match="block 3 has a key already"):
        add_chain(index, [3], tokens(5, 6, 7, 8))


def test_removing_what_is_not_indexed_is_our_bug():
    with pytest.raises(AssertionError, match="block 2 has no key"):
        make_index().remove(2)


def test_no_block_is_not_the_last_block():
    index = make_index()
    add_chain(index, [7], tokens(0, 1, 2, 3))
    for refused in (index.key_of, index.remove, index.block_before):
        with pytest.raises(AssertionError, match="block -1"):
            refused(NO_BLOCK)


def test_moving_from_or_to_the_wrong_block_is_our_bug():
    index = make_index()
    add_chain(index, [0, 1], tokens(*range(8)))
    with pytest.raises(AssertionError, match="block 2 has no key"):
        index.move(2, 3)
    with pytest.raises(AssertionError, match="block 1 has a key already"):
        index.move(0, 1)


def test_tokens_of_half_a_block_are_our_bug():
    index = make_index()
    with pytest.raises(AssertionError, match="8 bytes of tokens for a block of 4"):
        index.add(0, child_key(ROOT, b"\0" * 8), ROOT, b"\0" * 8)
    with pytest.raises(AssertionError, match="a key of 3 bytes"):
        index.add(0, b"abc", ROOT, b"\0" * 16)
    assert_empty(index)
