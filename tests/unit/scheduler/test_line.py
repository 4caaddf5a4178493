"""Who comes next: priority and age within a tenant, service between tenants."""

import itertools
import random

import pytest

from pageframe.scheduler.line import NEVER_NS, Line
from pageframe.scheduler.policies.order import (
    WINDOW_NS,
    FairOrder,
    FirstComeOrder,
    PrefixAwareOrder,
)
from pageframe.scheduler.sequence import Sequence, SequenceState
from pageframe.scheduler.shares import Shares
from unit.scheduler.test_sequence import make_sequence

SECOND_NS = 1_000_000_000


class Hall:
    """A line with its tenants."""

    def __init__(self, order=None, *, ageing_ns=NEVER_NS, weights=None) -> None:
        self.shares = Shares(weights or {})
        self.line = Line(order or FairOrder(), self.shares, ageing_ns=ageing_ns)
        self.num_made = 0

    def make(self, *, at_ns: int = 0, num_prompt_tokens: int = 10, **submission) -> Sequence:
        self.num_made += 1
        sequence = make_sequence(num_prompt_tokens, self.num_made, **submission)
        sequence.submit_ns = at_ns
        sequence.share = self.shares.enter(sequence.submission.tenant)
        return sequence

    def wait(self, **fields) -> Sequence:
        sequence = self.make(**fields)
        self.line.add(sequence)
        return sequence

    def serve(self, sequence: Sequence, num_tokens: int) -> None:
        self.line.remove(sequence)
        sequence.share.num_prompt_tokens += num_tokens
        self.shares.join(sequence.share, sequence.num_tokens)

    def next_few(self, num_sequences: int) -> list[Sequence]:
        walk, few = self.line.walk(), []
        while len(few) < num_sequences and (sequence := walk.current) is not None:
            few.append(sequence)
            walk.pass_sequence()
        walk.close()
        return few

    def serve_all(self, num_tokens: int = 100) -> list[int]:
        served = []
        while (sequence := self.line.first) is not None:
            self.serve(sequence, num_tokens)
            served.append(sequence.sequence_id)
        return served


def test_within_a_tenant_priority_goes_before_arrival_and_preempted_ones_before_all():
    hall = Hall()
    hall.wait()
    hall.wait(priority=-1)
    hall.wait(priority=3)
    again = hall.make(priority=-5)
    again.state = SequenceState.PREEMPTED
    hall.line.add(again)
    assert (len(hall.line), hall.line.num_preempted) == (4, 1)
    assert hall.serve_all() == [4, 3, 1, 2]
    assert (len(hall.line), hall.line.num_preempted) == (0, 0)


def test_without_ageing_no_time_makes_up_for_a_level_of_priority():
    hall = Hall()
    hall.wait(at_ns=0)
    hall.wait(at_ns=10**9 * SECOND_NS, priority=1)
    assert hall.serve_all() == [2, 1]


def test_with_ageing_each_interval_of_waiting_is_worth_a_level():
    hall = Hall(ageing_ns=10 * SECOND_NS)
    hall.wait(at_ns=0)
    hall.wait(at_ns=9 * SECOND_NS, priority=1)
    hall.wait(at_ns=11 * SECOND_NS, priority=1)
    hall.wait(at_ns=29 * SECOND_NS, priority=3)
    assert hall.serve_all() == [2, 4, 1, 3]


@pytest.mark.parametrize("order", [FairOrder(), FirstComeOrder(), PrefixAwareOrder()])
def test_nobody_starves_behind_an_endless_stream_of_higher_priority(order):
    hall = Hall(order, ageing_ns=10 * SECOND_NS)
    low = hall.wait(at_ns=0, priority=0)
    num_passed = 0
    for second in range(1, 1000):
        hall.wait(at_ns=second * SECOND_NS, priority=4)
        first = hall.line.first
        if first is low:
            break
        hall.serve(first, 10)
        num_passed += 1
    # Those who came within 40 s (and a window of groups) go first, and nobody after them.
    window_s = WINDOW_NS // SECOND_NS if isinstance(order, PrefixAwareOrder) else 0
    assert 39 <= num_passed <= 40 + window_s


def test_tenants_take_turns_by_what_they_were_served():
    hall = Hall()
    for tenant in "aaaabb":
        hall.wait(tenant=tenant)
    # 5 and 6 are those of b: of equals the tenant whose first came first goes first.
    assert hall.serve_all() == [1, 5, 2, 6, 3, 4]


def test_a_weight_is_a_multiple_of_turns():
    hall = Hall(weights={"b": 3.0})
    for tenant in "aaaabbbbbb":
        hall.wait(tenant=tenant)
    served = hall.serve_all()
    first_eight = ["a" if i <= 4 else "b" for i in served[:8]]
    assert (first_eight.count("a"), first_eight.count("b")) == (2, 6)


def test_a_large_request_costs_its_tenant_more_turns_than_a_small_one():
    hall = Hall()
    for tenant in "aabbbbb":
        hall.wait(tenant=tenant)
    hall.serve(hall.line.first, 400)
    assert hall.serve_all(100) == [3, 4, 5, 6, 2, 7]


def test_output_of_those_who_run_counts_while_the_line_stands():
    hall = Hall()
    running = hall.wait(tenant="a")
    hall.serve(running, 10)
    hall.wait(tenant="a")
    hall.wait(tenant="b")
    assert hall.line.first.submission.tenant == "a"
    running.share.num_output_tokens += 1
    assert hall.line.first.submission.tenant == "b"


def test_who_comes_back_starts_where_the_others_are():
    hall = Hall()
    hall.wait(tenant="b")
    assert hall.serve_all(10) == [1]
    for _ in range(6):
        hall.wait(tenant="a")
    for _ in range(4):
        hall.serve(hall.line.first, 100)
    # b was served 10 tokens and a 400; b has no credit of 390 for that.
    for _ in range(3):
        hall.wait(tenant="b")
    assert hall.serve_all(100) == [6, 8, 7, 9, 10]


def test_who_comes_while_nobody_waits_starts_where_the_last_one_is_that_was_served():
    hall = Hall()
    first = hall.wait(tenant="a")
    hall.serve(first, 10)
    first.share.num_output_tokens += 5000
    hall.wait(tenant="b")
    assert hall.shares.enter("b").virtual_time == 5010
    hall.serve_all(100)


def test_a_charge_that_is_taken_back_moves_a_tenant_forward():
    hall = Hall()
    for tenant in "aab":
        hall.wait(tenant=tenant)
    first = hall.line.first
    hall.serve(first, 100)
    assert hall.line.first.submission.tenant == "b"
    first.share.num_prompt_tokens -= 100
    hall.line.refresh(first.share)
    assert hall.line.first.sequence_id == 2


def test_first_come_keeps_one_line_for_all_tenants():
    hall = Hall(FirstComeOrder())
    for at_ns, tenant in enumerate("aabab"):
        hall.wait(tenant=tenant, at_ns=at_ns, priority=1 if at_ns == 3 else 0)
    assert hall.serve_all() == [4, 1, 2, 3, 5]


def prompt(group: int) -> list[int]:
    return [group] * 80


def test_prompts_that_begin_alike_follow_one_another():
    hall = Hall(PrefixAwareOrder())
    groups = [1, 2, 1, 3, 2, 1, 3, 1]
    for at_ns, group in enumerate(groups):
        sequence = hall.make(at_ns=at_ns)
        sequence.submission.prompt_token_ids = prompt(group)
        hall.line.add(sequence)
    served = [groups[i - 1] for i in hall.serve_all()]
    num_switches = sum(a != b for a, b in itertools.pairwise(served))
    assert num_switches == 2


def test_the_group_that_ends_a_window_begins_the_next():
    hall = Hall(PrefixAwareOrder())
    groups = [1, 2, 1, 2, 1, 2, 2, 1]
    for index, group in enumerate(groups):
        sequence = hall.make(at_ns=0 if index < 4 else WINDOW_NS)
        sequence.submission.prompt_token_ids = prompt(group)
        hall.line.add(sequence)
    served = [groups[i - 1] for i in hall.serve_all()]
    num_switches = sum(a != b for a, b in itertools.pairwise(served))
    assert num_switches == 2


def test_nobody_is_passed_by_a_group_that_came_a_window_later():
    print("seed=11")
    rng = random.Random(11)
    hall = Hall(PrefixAwareOrder())
    arrivals = {}
    for _ in range(300):
        at_ns = rng.randrange(10 * WINDOW_NS)
        sequence = hall.make(at_ns=at_ns)
        sequence.submission.prompt_token_ids = prompt(rng.randint(1, 5))
        hall.line.add(sequence)
        arrivals[sequence.sequence_id] = at_ns
    latest_ns = 0
    for sequence_id in hall.serve_all():
        assert latest_ns - arrivals[sequence_id] < WINDOW_NS
        latest_ns = max(latest_ns, arrivals[sequence_id])


def expected_order(waiting: list[Sequence]) -> list[Sequence]:
    """The slow, obvious version: rank everybody, take the first, as often as somebody is left."""
    order = []
    waiting = list(waiting)
    while waiting:
        heads = {}
        for sequence in sorted(waiting, key=lambda s: s.place):
            heads.setdefault(sequence.submission.tenant, sequence)
        first = min(
            heads.values(),
            key=lambda s: (int(s.share.virtual_time * 1024), s.submit_ns, s.sequence_id),
        )
        waiting.remove(first)
        order.append(first)
    return order


def test_a_line_keeps_its_order_whatever_comes_and_goes():
    print("seed=7")
    rng = random.Random(7)
    hall = Hall(weights={"a": 2.0, "b": 0.5})
    inside: list[Sequence] = []
    for step in range(600):
        inside.append(hall.wait(tenant=rng.choice("abcd"), at_ns=step))
        if rng.random() < 0.6:
            gone = inside.pop(rng.randrange(len(inside)))
            hall.line.remove(gone)
            assert gone not in hall.line
        if rng.random() < 0.5:
            rng.choice(inside).share.num_output_tokens += rng.randint(1, 50)
        if rng.random() < 0.1 and inside:
            first = expected_order(inside)[0]
            assert hall.line.first is first
            hall.serve(first, 20)
            inside.remove(first)
        assert hall.next_few(4) == expected_order(inside)[:4]
        assert len(hall.line) == len(inside)
        assert {s.sequence_id for s in hall.line} == {s.sequence_id for s in inside}
        assert len(hall.line._heap) <= 2 * 4 + 64


def test_a_walk_goes_on_whatever_is_taken_out_under_its_feet_and_passes_tenants():
    print("seed=8")
    rng = random.Random(8)
    for _ in range(50):
        hall = Hall()
        inside = [hall.wait(tenant=rng.choice("abc"), at_ns=i) for i in range(20)]
        walk, passed, left = hall.line.walk(), set(), list(inside)
        for expected in expected_order(inside):
            if expected.submission.tenant in passed:
                continue
            assert walk.current is expected
            act = rng.random()
            if act < 0.1:
                passed.add(expected.submission.tenant)
                walk.pass_tenant()
            elif act < 0.5:
                hall.line.remove(expected)
                left.remove(expected)
            else:
                walk.pass_sequence()
        assert walk.current is None
        walk.close()
        assert hall.next_few(20) == expected_order(left)


def test_looking_at_the_first_costs_no_more_when_a_thousand_tenants_wait():
    hall = Hall()
    num_ranked = 0

    class Counting(FairOrder):
        def rank(self, head, tenant):
            nonlocal num_ranked
            num_ranked += 1
            return super().rank(head, tenant)

    hall.line = Line(Counting(), hall.shares)
    for index in range(1000):
        hall.wait(tenant=str(index))
    num_ranked = 0
    for _ in range(10):
        hall.serve(hall.line.first, 100)
        assert hall.line.first is hall.line.first
    # Each was alone in its queue, so nobody has to be ranked anew.
    assert num_ranked == 0


def test_those_about_to_come_are_found_without_ranking_anybody():
    hall = Hall()
    for tenant in "aaaabbc":
        hall.wait(tenant=tenant)
    hall.line._order = None
    assert [s.sequence_id for s in hall.line.about_next(5)] == [1, 5, 7, 2, 6]
    assert len(hall.line.about_next(20)) == 7
    assert Hall().line.about_next(3) == []
