"""Eviction policies on tiny pools, with literal victims; what both have to do is asked of both."""

import importlib.metadata
import sys
from types import ModuleType

import pytest

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.executor.memory.eviction import (
    ENTRY_POINT_GROUP,
    CostAwareEviction,
    EvictionPolicy,
    LruEviction,
    load_eviction_policy,
)

EVERY_POLICY = pytest.mark.parametrize("make", [LruEviction, CostAwareEviction])


def insert_chain(policy: EvictionPolicy, *block_ids: int, depth: int = 0, parent: int = -1) -> None:
    policy.insert(block_ids, range(depth, depth + len(block_ids)), parent)


def take_all(policy: EvictionPolicy) -> list[int]:
    victims = policy.take(len(policy))
    assert len(policy) == 0
    return victims


@EVERY_POLICY
def test_a_new_policy_is_empty(make):
    policy = make()
    assert isinstance(policy, EvictionPolicy)
    assert len(policy) == 0
    assert 0 not in policy
    assert policy.take(3) == policy.upcoming(3) == []


@EVERY_POLICY
def test_the_tail_of_a_chain_goes_before_its_head(make):
    policy = make()
    insert_chain(policy, 4, 0, 7)
    assert len(policy) == 3
    assert all(block_id in policy for block_id in (4, 0, 7))
    assert take_all(policy) == [7, 0, 4]


@EVERY_POLICY
def test_of_two_equal_chains_the_older_goes_first(make):
    policy = make()
    insert_chain(policy, 5)
    insert_chain(policy, 3)
    assert take_all(policy) == [5, 3]


@EVERY_POLICY
def test_upcoming_is_what_take_returns_and_removes_nothing(make):
    policy = make()
    insert_chain(policy, 1, 2, 3)
    insert_chain(policy, 6, 5)
    expected = policy.upcoming(4)
    assert policy.upcoming(4) == expected
    assert len(policy) == 5
    assert policy.upcoming(9) == [*expected, *policy.upcoming(5)[4:]]
    assert policy.take(4) == expected
    assert len(policy) == 1


@EVERY_POLICY
def test_asked_for_more_than_there_is_all_are_returned(make):
    policy = make()
    insert_chain(policy, 1, 2)
    assert policy.take(3) == [2, 1]
    assert policy.take(3) == []


@EVERY_POLICY
def test_taking_none_changes_nothing(make):
    policy = make()
    insert_chain(policy, 1)
    assert policy.take(0) == policy.upcoming(0) == []
    assert 1 in policy


@EVERY_POLICY
def test_a_block_that_was_taken_up_is_no_victim(make):
    policy = make()
    insert_chain(policy, 1, 2, 3)
    policy.discard(1)
    policy.discard(3)
    assert 1 not in policy
    assert 3 not in policy
    assert policy.upcoming(3) == take_all(policy) == [2]


@EVERY_POLICY
def test_a_block_that_is_needed_again_goes_later(make):
    policy = make()
    insert_chain(policy, 1)
    insert_chain(policy, 2)
    policy.discard(1)
    insert_chain(policy, 1)
    assert take_all(policy) == [2, 1]


@EVERY_POLICY
def test_a_fork_leaves_the_shared_head_for_last(make):
    """Blocks 0 and 1 are shared by tails 2 and 3; the first to finish leaves only its tail."""
    policy = make()
    insert_chain(policy, 2, depth=2, parent=1)
    insert_chain(policy, 0, 1, 3)
    assert take_all(policy) == [2, 3, 1, 0]


@EVERY_POLICY
def test_a_head_that_comes_in_by_itself_outlasts_its_deeper_tail(make):
    policy = make()
    insert_chain(policy, 8, 9, depth=5000, parent=7)
    insert_chain(policy, 7, depth=4999, parent=6)
    insert_chain(policy, 5, 6, depth=4997)
    assert take_all(policy) == [9, 8, 7, 6, 5]


@EVERY_POLICY
def test_a_moved_block_keeps_its_turn(make):
    policy = make()
    for block_id in (1, 2, 3):
        insert_chain(policy, block_id)
    policy.move(2, 9)
    assert 2 not in policy
    assert 9 in policy
    assert len(policy) == 3
    assert policy.upcoming(3) == take_all(policy) == [1, 9, 3]


@EVERY_POLICY
def test_a_place_that_was_moved_away_from_can_be_used_again(make):
    policy = make()
    insert_chain(policy, 1)
    insert_chain(policy, 2)
    policy.move(1, 9)
    insert_chain(policy, 1)
    assert take_all(policy) == [9, 2, 1]


@EVERY_POLICY
def test_moving_a_held_block_puts_nothing_inside(make):
    policy = make()
    insert_chain(policy, 1)
    policy.discard(1)
    policy.move(1, 4)
    policy.move(5, 6)
    assert len(policy) == 0
    insert_chain(policy, 4)
    assert take_all(policy) == [4]


@EVERY_POLICY
def test_wrong_calls_are_our_bug(make):
    policy = make()
    insert_chain(policy, 1, 2)
    with pytest.raises(AssertionError, match="block 3 is not inside"):
        policy.discard(3)
    with pytest.raises(AssertionError, match="block 1 is inside already"):
        insert_chain(policy, 1)
    with pytest.raises(AssertionError, match="block 2 is inside already"):
        policy.move(1, 2)
    with pytest.raises(AssertionError, match="2 blocks, 1 depths"):
        policy.insert([3, 4], [0])


def test_lru_knows_neither_cost_nor_hits():
    policy = LruEviction()
    insert_chain(policy, 1, depth=9000)
    for _ in range(5):
        policy.discard(1)
        insert_chain(policy, 1, depth=9000)
    insert_chain(policy, 2)
    assert take_all(policy) == [1, 2]


def test_the_block_that_costs_more_stays_longer():
    policy = CostAwareEviction(num_blocks_at_double_cost=10)
    insert_chain(policy, 1, depth=20)
    insert_chain(policy, 2, depth=10)
    insert_chain(policy, 3, depth=0)
    assert take_all(policy) == [3, 2, 1]


def test_the_block_that_is_needed_more_often_stays_longer():
    policy = CostAwareEviction()
    for _ in range(3):
        insert_chain(policy, 1)
        policy.discard(1)
    insert_chain(policy, 1)
    insert_chain(policy, 2)
    insert_chain(policy, 3)
    assert take_all(policy) == [2, 3, 1]


def test_a_hit_weighs_as_much_as_double_the_cost():
    """Twice cached at cost 1 and once at cost 2 are equal, so the older one goes first."""
    policy = CostAwareEviction(num_blocks_at_double_cost=10)
    insert_chain(policy, 1)
    policy.discard(1)
    insert_chain(policy, 1)
    insert_chain(policy, 2, depth=10)
    insert_chain(policy, 3, depth=9)
    assert take_all(policy) == [3, 1, 2]


def test_a_head_ranks_as_high_as_the_dearest_of_its_tails():
    """Tail 2 is dear and comes in first, tail 3 is cheap; a stranger's block lies between them."""
    policy = CostAwareEviction(num_blocks_at_double_cost=10)
    insert_chain(policy, 2, depth=30, parent=1)
    insert_chain(policy, 3, depth=2, parent=1)
    insert_chain(policy, 8, depth=20)
    insert_chain(policy, 0, 1)
    assert take_all(policy) == [3, 8, 2, 1, 0]


def test_a_head_that_was_hit_more_often_than_its_tail_outlasts_it_by_that():
    """Priorities 11 for tail 1 and 30 for head 0; a stranger's block lies between them."""
    policy = CostAwareEviction(num_blocks_at_double_cost=10)
    insert_chain(policy, 0)
    policy.discard(0)
    insert_chain(policy, 0)
    policy.discard(0)
    insert_chain(policy, 0, 1)
    insert_chain(policy, 8, depth=10)
    assert take_all(policy) == [1, 8, 0]


def test_a_head_keeps_the_rank_that_its_tail_gave_it():
    """Taken up and put back without the tail, which is still inside and was dear."""
    policy = CostAwareEviction(num_blocks_at_double_cost=10)
    policy.insert([0, 1], [0, 29])
    policy.discard(0)
    insert_chain(policy, 8, depth=25)
    insert_chain(policy, 0)
    assert take_all(policy) == [8, 1, 0]


def test_a_block_that_was_hit_often_ages_as_others_go():
    """Priority 4 for block 1; each victim raises what comes in next by one."""
    policy = CostAwareEviction()
    for _ in range(3):
        insert_chain(policy, 1)
        policy.discard(1)
    insert_chain(policy, 1)
    victims = []
    for block_id in range(2, 8):
        insert_chain(policy, block_id)
        victims += policy.take(1)
    assert victims == [2, 3, 4, 1, 5, 6]


def test_what_is_known_of_a_block_ends_when_it_is_taken():
    policy = CostAwareEviction()
    for _ in range(3):
        insert_chain(policy, 1)
        policy.discard(1)
    insert_chain(policy, 1)
    assert policy.take(1) == [1]
    insert_chain(policy, 1)
    insert_chain(policy, 2)
    assert take_all(policy) == [1, 2]


@pytest.mark.parametrize("is_held", [False, True])
def test_hits_go_along_when_content_moves(is_held):
    policy = CostAwareEviction()
    for _ in range(3):
        insert_chain(policy, 1)
        policy.discard(1)
    if is_held:
        policy.move(1, 9)
        insert_chain(policy, 9)
    else:
        insert_chain(policy, 1)
        policy.move(1, 9)
    insert_chain(policy, 1)
    insert_chain(policy, 2)
    assert take_all(policy) == [1, 2, 9]


def test_content_without_hits_takes_none_over_from_where_it_moves():
    policy = CostAwareEviction()
    for _ in range(3):
        insert_chain(policy, 9)
        policy.discard(9)
    policy.move(1, 9)
    insert_chain(policy, 9)
    insert_chain(policy, 2)
    assert take_all(policy) == [9, 2]


def test_the_least_priority_of_a_held_head_moves_with_it():
    policy = CostAwareEviction()
    insert_chain(policy, 8, depth=5000, parent=7)
    policy.move(7, 3)
    insert_chain(policy, 3, depth=4999)
    assert take_all(policy) == [8, 3]


def test_the_heap_does_not_grow_with_hits():
    """Each hit leaves an empty run; they may be at most as many as the others, and 64."""
    policy = CostAwareEviction()
    for block_id in range(10):
        insert_chain(policy, block_id)
    for _ in range(1000):
        policy.discard(0)
        insert_chain(policy, 0)
        assert len(policy._heap) <= 2 * len(policy) + 65
    assert take_all(policy) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]


def test_a_run_does_not_keep_the_places_of_a_head_that_is_hit():
    """A head of 50 blocks under ever new tails: each call leaves its tail behind, and no more."""
    policy = CostAwareEviction()
    for tail in range(100, 200):
        insert_chain(policy, *range(50), tail)
        for block_id in range(50):
            policy.discard(block_id)
    assert sum(len(run.block_ids) for _, _, run in policy._heap) == len(policy) == 100
    assert take_all(policy) == list(range(100, 200))


def test_blocks_may_go_from_the_middle_of_a_chain():
    policy = CostAwareEviction()
    insert_chain(policy, *range(6))
    for block_id in (3, 5):
        policy.discard(block_id)
    assert policy.upcoming(3) == [4, 2, 1]
    assert policy.take(1) == [4]
    policy.discard(2)
    policy.move(1, 9)
    policy.discard(9)
    insert_chain(policy, 9)
    assert policy.upcoming(9) == take_all(policy) == [0, 9]


def test_a_heap_that_was_taken_from_keeps_no_more_empty_runs_than_others():
    """The dearest 100 of 200 become empty; taking the others leaves nothing else in the heap."""
    policy = CostAwareEviction()
    for block_id in range(200):
        insert_chain(policy, block_id, depth=block_id)
    for block_id in range(100, 200):
        policy.discard(block_id)
    assert policy.take(99) == list(range(99))
    assert len(policy._heap) == len(policy) == 1


def test_the_heap_that_is_built_anew_is_in_order():
    """Came in dearest first; after 133 of 200 are gone more than half of the runs are empty."""
    policy = CostAwareEviction()
    for block_id in range(200):
        insert_chain(policy, block_id, depth=200 - block_id)
    for block_id in range(133):
        policy.discard(block_id)
    assert len(policy._heap) == 67
    assert take_all(policy) == list(range(199, 132, -1))


@pytest.mark.parametrize(
    ("name", "policy"), [("lru", LruEviction), ("cost-aware", CostAwareEviction)]
)
def test_the_built_in_policies_need_no_installation(name, policy, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", None)
    first = load_eviction_policy(name)
    assert type(first) is policy
    assert load_eviction_policy(name) is not first


class FirstInFirstOut(LruEviction):
    """What another package might bring."""


class Incomplete:
    """A policy that was forgotten half way."""

    def insert(self) -> None:
        pass


def fail() -> EvictionPolicy:
    raise OSError("no such table")


@pytest.fixture
def _installed(monkeypatch):
    """Four policies of another package; one of them is not in it."""
    module = ModuleType("policies_of_others")
    module.FirstInFirstOut = FirstInFirstOut
    module.Incomplete = Incomplete
    module.fail = fail
    monkeypatch.setitem(sys.modules, module.__name__, module)
    points = importlib.metadata.EntryPoints(
        importlib.metadata.EntryPoint(name, f"policies_of_others:{target}", ENTRY_POINT_GROUP)
        for name, target in (
            ("fifo", "FirstInFirstOut"),
            ("incomplete", "Incomplete"),
            ("failing", "fail"),
            ("gone", "Removed"),
        )
    )
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **selected: points.select(**selected)
    )


@pytest.mark.usefixtures("_installed")
def test_a_policy_of_another_package_is_found_by_its_entry_point():
    assert type(load_eviction_policy("fifo")) is FirstInFirstOut


@pytest.mark.usefixtures("_installed")
def test_an_unknown_policy_is_refused_with_all_that_are_installed():
    with pytest.raises(InvalidRequestError) as caught:
        load_eviction_policy("lfu")
    assert caught.value.reason == "EVICTION_POLICY_UNKNOWN"
    assert caught.value.message == (
        "eviction policy 'lfu' is unknown; installed are "
        "cost-aware, failing, fifo, gone, incomplete, lru"
    )
    assert caught.value.limits["eviction_policy"] == "lfu"


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("incomplete", "Incomplete lacks methods of EvictionPolicy"),
        ("failing", "OSError: no such table"),
        ("gone", "AttributeError"),
    ],
)
def test_a_policy_that_cannot_be_made_says_why(name, why):
    with pytest.raises(PreconditionError, match=why) as caught:
        load_eviction_policy(name)
    assert caught.value.reason == "EVICTION_POLICY_BROKEN"
    assert caught.value.limits["eviction_policy"] == name
    assert caught.value.limits["entry_point"].startswith("policies_of_others:")


def test_an_empty_name_is_unknown():
    with pytest.raises(InvalidRequestError, match="EVICTION_POLICY_UNKNOWN"):
        load_eviction_policy("")
