"""Whom policies may choose, what that is said to cost, and what the built-in ones make of it."""

import pytest

from pageframe.core.plan import Recovery
from pageframe.scheduler.candidates import NUM_CANDIDATES_MAX
from pageframe.scheduler.policies.protocols import Costs, VictimView
from pageframe.scheduler.policies.recovery import (
    CheapestRecovery,
    RecomputeRecovery,
    SwapRecovery,
    TailRecovery,
)
from pageframe.scheduler.policies.registry import VICTIM
from pageframe.scheduler.policies.victim import CheapestVictim, YoungestVictim
from pageframe.testing.fake_engine import make_facts
from unit.scheduler.driver import Driver, make_submission


def view(sequence_id: int, **fields) -> VictimView:
    """A victim of ten blocks that cost 100 ns each."""
    return VictimView(
        **{
            "sequence_id": sequence_id,
            "tenant": "",
            "priority": 0,
            "join_number": sequence_id,
            "num_computed_tokens": 40,
            "num_output_tokens_left": 100,
            "num_blocks": 10,
            "num_blocks_short": 1,
            "num_blocks_soon": 4,
            "num_preemptions": 0,
            "num_steps_since_preempted": -1,
            "has_lost_tail": False,
            "costs": Costs(1000, None, None),
            **fields,
        }
    )


def ordered(*views: VictimView) -> list[int]:
    return CheapestVictim().order(views, 0)


def test_the_youngest_is_who_joined_last():
    views = [view(7, join_number=1), view(3, join_number=9), view(5, join_number=4)]
    assert YoungestVictim().order(views, 0) == [3, 5, 7]


def test_of_equals_the_youngest_goes_first():
    assert ordered(view(1), view(2), view(3)) == [3, 2, 1]


def test_whoever_is_much_cheaper_for_each_block_that_is_needed_goes_first():
    cheap = view(1, num_blocks=40, num_blocks_soon=40, costs=Costs(1900, None, None))
    assert ordered(cheap, view(2, num_blocks_soon=40)) == [1, 2]
    # Its other thirty blocks are of no use to anybody soon.
    large = cheap._replace(num_blocks_soon=10)
    assert ordered(large, view(2, num_blocks_soon=10)) == [2, 1]


def test_of_those_that_cost_about_the_same_the_youngest_goes():
    views = [view(1, costs=Costs(1000, None, None)), view(2, costs=Costs(2000, None, None))]
    assert ordered(*views, view(3, costs=Costs(2001, None, None))) == [2, 1, 3]


def test_the_cheapest_way_back_counts():
    assert ordered(view(1, costs=Costs(2000, 499, None)), view(2)) == [1, 2]


def test_whoever_is_less_urgent_goes_before_whoever_is_cheaper():
    assert ordered(view(1, priority=1, costs=Costs(1, None, None)), view(2)) == [2, 1]


def test_whoever_waits_with_its_tail_gone_goes_before_all_others():
    waiting = view(1, has_lost_tail=True, priority=5, costs=Costs(9999, None, None))
    assert ordered(waiting, view(2)) == [1, 2]


def test_whoever_gave_way_lately_is_dearer_until_that_is_forgotten():
    lately = view(2, num_preemptions=2, num_steps_since_preempted=31)
    assert ordered(view(1), lately) == [1, 2]
    assert ordered(view(1), lately._replace(num_preemptions=1)) == [2, 1]
    assert ordered(view(1), lately._replace(num_steps_since_preempted=32)) == [2, 1]
    # Thrice 1000 is not much more than 1600.
    assert ordered(view(1, costs=Costs(1600, None, None)), lately) == [2, 1]


@pytest.mark.parametrize(
    ("costs", "cheapest"),
    [
        (Costs(100, None, None), Recovery.RECOMPUTE),
        (Costs(100, 99, None), Recovery.SWAP),
        (Costs(100, 99, 98), Recovery.TAIL),
        (Costs(100, 100, 100), Recovery.RECOMPUTE),
        (Costs(100, 20, 50), Recovery.SWAP),
    ],
)
def test_the_cheapest_recovery_is_chosen_of_those_that_can_be_had(costs, cheapest):
    assert CheapestRecovery().choose(view(1, costs=costs), 0) is cheapest


def test_a_tail_is_not_chosen_where_all_of_the_victim_is_needed_soon():
    costs = Costs(100, None, 5)
    assert CheapestRecovery().choose(view(1, costs=costs, num_blocks_soon=9), 0) is Recovery.TAIL
    whole = view(1, costs=costs, num_blocks_soon=10)
    assert CheapestRecovery().choose(whole, 0) is Recovery.RECOMPUTE


def test_one_of_whom_all_is_wanted_has_no_tail_to_choose():
    wanted = view(1, num_blocks_short=0, num_blocks_soon=0)
    assert CheapestRecovery().choose(wanted, 0) is Recovery.RECOMPUTE


def test_a_fixed_recovery_is_a_recompute_where_it_cannot_be_had():
    can, cannot = view(1, costs=Costs(9, 9, 9)), view(1)
    assert RecomputeRecovery().choose(can, 0) is Recovery.RECOMPUTE
    assert SwapRecovery().choose(can, 0) is Recovery.SWAP
    assert SwapRecovery().choose(cannot, 0) is Recovery.RECOMPUTE
    assert TailRecovery().choose(can, 0) is Recovery.TAIL
    assert TailRecovery().choose(cannot, 0) is Recovery.RECOMPUTE


def test_what_has_to_be_paid_anyway_is_no_cost_of_giving_way():
    assert Costs(9, None, 3).less(4) == Costs(5, None, 0)
    assert Costs(9, 4, None).less(4) == Costs(5, 0, None)


class Watching(YoungestVictim):
    """Remembers what it was asked."""

    asked: list[tuple[VictimView, ...]]

    def order(self, candidates, now_ns):
        self.asked.append(candidates)
        return super().order(candidates, now_ns)


@pytest.fixture
def watching(monkeypatch):
    monkeypatch.setitem(VICTIM.built_in, "watching", Watching)
    Watching.asked = []
    return Watching.asked


def test_a_policy_sees_what_is_at_stake(watching):
    facts = make_facts(num_blocks=6, block_size=4, num_host_blocks=8)
    driver = Driver(facts=facts, lookahead=False, token_budget=64, victim_policy="watching")
    for handle in (1, 2, 3):
        driver.submit(make_submission(handle, 3, max_tokens=12, priority=handle))
    while not watching:
        driver.step()
    youngest, second = watching[0]
    # Two blocks each, all three reach position 8, and the third has the highest priority.
    assert (youngest.sequence_id, second.sequence_id) == (1, 2)
    assert (youngest.num_computed_tokens, youngest.num_blocks) == (8, 2)
    assert (youngest.num_blocks_short, youngest.num_output_tokens_left) == (3, 6)
    # Each of the three needs another one after four steps, within the eight that are looked at.
    assert youngest.num_blocks_soon == 6
    assert (youngest.num_preemptions, youngest.num_steps_since_preempted) == (0, -1)
    assert (youngest.priority, second.priority) == (1, 2)
    rates = driver.scheduler._losses._rates
    assert youngest.costs == Costs(
        # Both blocks are full; from the host tier they have to come either way.
        recompute_ns=round(2 * rates.block_ns),
        swap_ns=round(4 * rates.block_ns),
        tail_ns=None,
    )


def test_a_tail_is_what_is_short_and_costs_no_more_than_its_tokens(watching):
    facts = make_facts(num_blocks=8, block_size=4)
    driver = Driver(facts=facts, lookahead=False, token_budget=64, victim_policy="watching")
    for handle in (1, 2, 3):
        driver.submit(make_submission(handle, 7, max_tokens=9))
    while not watching:
        driver.step()
    # One of two blocks is short, and seven tokens are computed: three of them are behind it.
    rates = driver.scheduler._losses._rates
    assert watching[0][0].costs.tail_ns == round(4 * rates.token_ns)
    assert watching[0][0].costs.recompute_ns == round(8 * rates.token_ns)


def test_a_plan_looks_at_few_of_many(watching):
    facts = make_facts(num_blocks=80, block_size=4, max_num_sequences=64)
    driver = Driver(
        facts=facts, lookahead=False, token_budget=256, max_num_running=60, victim_policy="watching"
    )
    for handle in range(1, 41):
        driver.submit(make_submission(handle, 7, max_tokens=30))
    num_running = 0
    while not watching:
        num_running = driver.scheduler.snapshot().num_running
        driver.step()
    assert num_running > 2 * NUM_CANDIDATES_MAX
    assert {len(candidates) for candidates in watching} == {NUM_CANDIDATES_MAX}
    assert len(driver.sent[-1].victims) <= 2 * NUM_CANDIDATES_MAX
