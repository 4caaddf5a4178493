"""Policies by name, what happens to one that misbehaves, and what a shadow sees."""

import importlib.metadata
import sys
from types import ModuleType

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.core.plan import Recovery
from pageframe.scheduler.policies import registry
from pageframe.scheduler.policies.guard import BrokenPolicyError, Guard
from pageframe.scheduler.policies.registry import GROUPS, VICTIM, load
from pageframe.scheduler.policies.shadow import Decision
from pageframe.scheduler.policies.victim import YoungestVictim
from pageframe.testing.fake_engine import make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)
from unit.scheduler.test_tracing import Spans

MS = 1_000_000


def crowded(**fields) -> Driver:
    """Four sequences of up to four blocks each, in a pool of eight."""
    facts = make_facts(num_blocks=8, block_size=4)
    return Driver(facts=facts, token_budget=64, lookahead=False, **fields)


def serve_four(driver: Driver) -> None:
    requests = [make_submission(handle, 3, max_tokens=12) for handle in (1, 2, 3, 4)]
    for request in requests:
        driver.submit(request)
    driver.run()
    for request in requests:
        assert driver.output(request.handle) == expected_output(request, driver.facts)
    assert driver.scheduler.snapshot().num_running == 0
    assert_scheduler_empty(driver)


def num_victims(driver: Driver) -> int:
    return sum(len(plan.victims) for plan in driver.sent)


def counts_of(driver: Driver, group: str):
    return {count.group: count for count in driver.scheduler.snapshot().policies}[group]


# By name.


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_the_built_in_policies_need_no_installation(group, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", None)
    assert group.default in group.built_in
    for name, make in group.built_in.items():
        policy = load(group, name)
        assert type(policy) is type(make())
        assert load(group, name) is not policy
        assert all(callable(getattr(policy, method)) for method in group.methods)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_the_built_in_policies_are_entry_points_as_well(group):
    points = importlib.metadata.entry_points(group=group.entry_points)
    assert {point.name: point.load() for point in points} == group.built_in


@pytest.fixture
def _installed(monkeypatch):
    module = ModuleType("policies_of_others")
    module.Mine = YoungestVictim
    module.Incomplete = object

    def fail():
        raise OSError("no such table")

    module.fail = fail
    monkeypatch.setitem(sys.modules, "policies_of_others", module)
    points = importlib.metadata.EntryPoints(
        importlib.metadata.EntryPoint(name, f"policies_of_others:{target}", VICTIM.entry_points)
        for name, target in {
            "mine": "Mine",
            "incomplete": "Incomplete",
            "failing": "fail",
            "gone": "Nothing",
        }.items()
    )
    monkeypatch.setattr(
        registry.importlib.metadata, "entry_points", lambda **selected: points.select(**selected)
    )


@pytest.mark.usefixtures("_installed")
def test_a_policy_of_another_package_is_found_by_its_entry_point():
    assert type(load(VICTIM, "mine")) is YoungestVictim
    driver = crowded(victim_policy="mine")
    serve_four(driver)
    assert counts_of(driver, "victim").name == "mine"
    assert num_victims(driver) > 0


@pytest.mark.usefixtures("_installed")
def test_an_unknown_policy_is_refused_with_all_that_are_installed():
    with pytest.raises(InvalidRequestError) as caught:
        crowded(victim_policy="oldest")
    assert caught.value.reason == "POLICY_UNKNOWN"
    assert caught.value.message == (
        "victim policy 'oldest' is unknown; installed are "
        "cheapest, failing, gone, incomplete, mine, youngest"
    )
    assert caught.value.limits["policy"] == "oldest"


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("name", "why"),
    [("incomplete", "lacks order"), ("failing", "no such table"), ("gone", "AttributeError")],
)
def test_a_policy_that_cannot_be_made_is_named(name, why):
    with pytest.raises(PreconditionError, match=why) as caught:
        load(VICTIM, name)
    assert caught.value.reason == "POLICY_BROKEN"
    assert caught.value.limits["entry_point"].startswith("policies_of_others:")


def test_a_shadow_of_a_group_that_does_not_exist_is_refused():
    with pytest.raises(InvalidRequestError) as caught:
        crowded(shadow_policies={"eviction": "lru"})
    assert caught.value.reason == "POLICY_GROUP_UNKNOWN"
    assert "admission, order, recovery, victim" in caught.value.message


# Guarded.


def guard_of(policy):
    clock = ManualClock(1)
    return Guard(policy, clock), clock


def test_a_guard_passes_on_what_makes_sense():
    guard, _ = guard_of("policy")
    assert guard.ask(str.upper, lambda _: "") == "POLICY"


@pytest.mark.parametrize(
    ("question", "fault_of", "why"),
    [
        (lambda _: 1 // 0, lambda _: "", "it raised ZeroDivisionError"),
        (lambda _: sys.exit("enough"), lambda _: "", "it raised SystemExit: enough"),
        (lambda _: None, len, "it raised TypeError"),
        (lambda _: 5, lambda answer: f"{answer} is odd", "makes no sense: 5 is odd"),
    ],
)
def test_a_guard_says_what_was_wrong(question, fault_of, why):
    guard, _ = guard_of("policy")
    with pytest.raises(BrokenPolicyError, match=why):
        guard.ask(question, fault_of)


def test_one_long_call_breaks_a_policy():
    guard, clock = guard_of("policy")
    assert guard.ask(lambda _: clock.advance_ns(1000 * MS), lambda _: "") is None
    with pytest.raises(BrokenPolicyError, match="a call took 1001 ms; at most 1000 ms"):
        guard.ask(lambda _: clock.advance_ns(1001 * MS), lambda _: "")


def test_many_slow_calls_break_a_policy_and_a_single_pause_does_not():
    guard, clock = guard_of("policy")
    guard.ask(lambda _: clock.advance_ns(900 * MS), lambda _: "")
    for _ in range(2000):
        guard.ask(lambda _: clock.advance_ns(MS), lambda _: "")
    with pytest.raises(BrokenPolicyError, match="on average; at most 2 ms"):
        ask_often(guard, clock)


def ask_often(guard, clock):
    for _ in range(2000):
        guard.ask(lambda _: clock.advance_ns(3 * MS), lambda _: "")


class Raises:
    def order(self, candidates, now_ns):
        raise ValueError("which table?")


class Stranger:
    def order(self, candidates, now_ns):
        return [candidates[0].sequence_id, 99]


class Repeats:
    def order(self, candidates, now_ns):
        return [candidates[0].sequence_id] * 2


class Mute:
    def order(self, candidates, now_ns):
        return None


class Talks:
    def order(self, candidates, now_ns):
        return ["nobody"]


class Slow(YoungestVictim):
    clock: ManualClock

    def order(self, candidates, now_ns):
        self.clock.advance_ns(1500 * MS)
        return super().order(candidates, now_ns)


@pytest.mark.parametrize("policy", [Raises, Stranger, Repeats, Mute, Talks, Slow])
def test_a_broken_victim_policy_is_replaced_for_good_and_reported_once(policy, monkeypatch):
    monkeypatch.setitem(VICTIM.built_in, "broken", policy)
    driver = crowded(victim_policy="broken", trace=Spans())
    Slow.clock = driver.clock
    serve_four(driver)
    (fault,) = driver.faults
    assert (fault.group, fault.name, fault.is_shadow) == ("victim", "broken", False)
    assert counts_of(driver, "victim").name == "cheapest"
    (span,) = driver.trace.named("policy.fault")
    assert span.error == fault.why
    assert span.attributes["pageframe.policy.name"] == "broken"
    assert span.attributes["pageframe.step"] > 0
    assert num_victims(driver) > 1


class Unobtainable:
    def choose(self, victim, now_ns):
        return Recovery.SWAP


class Word:
    def choose(self, victim, now_ns):
        return "swap"


@pytest.mark.parametrize(
    ("policy", "why"), [(Unobtainable, "swap cannot be had"), (Word, "'swap' is no recovery")]
)
def test_a_recovery_that_cannot_be_had_breaks_its_policy(policy, why, monkeypatch):
    monkeypatch.setitem(registry.RECOVERY.built_in, "broken", policy)
    driver = crowded(recovery="broken")
    serve_four(driver)
    (fault,) = driver.faults
    assert why in fault.why


class Words:
    def key(self, waiting):
        return ("first",)

    def rank(self, head, tenant):
        return (1.5,)

    def admits(self, waiting, room):
        return 1


@pytest.mark.parametrize(
    ("group", "why"),
    [("order", "is no tuple of whole numbers"), ("admission", "1 is neither True nor False")],
)
def test_a_key_or_a_verdict_of_a_wrong_type_breaks_its_policy(group, why, monkeypatch):
    monkeypatch.setitem(GROUPS[group].built_in, "broken", Words)
    driver = crowded(more_policies={group: "broken"})
    serve_four(driver)
    (fault,) = driver.faults
    assert why in fault.why
    assert counts_of(driver, group).name == GROUPS[group].default


# In shadow.


class OldestVictim:
    def order(self, candidates, now_ns):
        return [view.sequence_id for view in reversed(candidates)]


def test_a_shadow_that_differs_is_counted_and_traced_and_changes_nothing(monkeypatch):
    monkeypatch.setitem(VICTIM.built_in, "oldest", OldestVictim)
    alone, watched = crowded(), crowded(shadow_policies={"victim": "oldest"}, trace=Spans())
    serve_four(alone)
    serve_four(watched)
    assert [plan.victims for plan in watched.sent] == [plan.victims for plan in alone.sent]
    count = counts_of(watched, "victim")
    assert (count.name, count.shadow_name) == ("youngest", "oldest")
    assert 0 < count.num_disagreements <= count.num_answers
    spans = watched.trace.named("policy.disagreement")
    assert len(spans) == count.num_disagreements
    first = next(plan for plan in watched.sent if len(plan.victims) > 1)
    attributes = spans[0].attributes
    assert attributes["pageframe.step"] == first.step
    assert attributes["pageframe.policy.choice"] == str(first.victims.sequence_ids[0])
    assert attributes["pageframe.policy.shadow_choice"] == "2"
    assert attributes["pageframe.policy.name"] == "youngest"
    assert attributes["pageframe.policy.shadow_name"] == "oldest"


def test_a_shadow_that_agrees_is_counted_only():
    driver = crowded(shadow_policies={"victim": "youngest"}, trace=Spans())
    serve_four(driver)
    count = counts_of(driver, "victim")
    assert count.num_answers > 0
    assert count.num_disagreements == 0
    assert driver.trace.named("policy.disagreement") == []


class LastComeOrder:
    def key(self, waiting):
        return (-waiting.sequence_id,)

    def rank(self, head, tenant):
        return (0,)


def test_orders_differ_where_somebody_would_go_before_another(monkeypatch):
    monkeypatch.setitem(registry.ORDER.built_in, "last", LastComeOrder)
    driver = Driver(shadow_policies={"order": "last"}, trace=Spans())
    serve_four(driver)
    count = counts_of(driver, "order")
    # The second, third and fourth: behind the one before, or before it.
    assert count.num_disagreements == count.num_answers == 3
    spans = driver.trace.named("policy.disagreement")
    assert {span.attributes["pageframe.policy.choice"] for span in spans} == {"behind"}


@pytest.mark.parametrize("policy", [Raises, Stranger, Slow])
def test_a_shadow_that_breaks_is_dropped_and_reported_once(policy, monkeypatch):
    monkeypatch.setitem(VICTIM.built_in, "broken", policy)
    driver = crowded(shadow_policies={"victim": "broken"}, trace=Spans())
    Slow.clock = driver.clock
    serve_four(driver)
    (fault,) = driver.faults
    assert (fault.name, fault.is_shadow) == ("broken", True)
    count = counts_of(driver, "victim")
    assert (count.name, count.shadow_name, count.num_answers) == ("youngest", "", 0)
    assert len(driver.trace.named("policy.fault")) == 1


def test_a_policy_or_a_shadow_that_broke_is_never_asked_again(monkeypatch):
    asked, faults = [], []

    class Counts:
        def order(self, candidates, now_ns):
            asked.append(now_ns)
            raise ValueError("which table?")

    monkeypatch.setitem(VICTIM.built_in, "broken", Counts)
    decision = Decision(
        VICTIM,
        "broken",
        shadow_name="broken",
        clock=ManualClock(1),
        on_fault=faults.append,
        on_disagreement=lambda _: pytest.fail("nobody answered"),
    )
    for now_ns in range(5):
        assert decision.ask(lambda policy, n=now_ns: policy.order([], n), lambda _: "", str) == []
    assert asked == [0, 0]
    assert [fault.is_shadow for fault in faults] == [False, True]
    assert (decision.name, decision.shadow_name) == ("cheapest", "")
