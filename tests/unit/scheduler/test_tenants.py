"""Quotas of tenants, as far as plans obey them."""

import pytest

from pageframe.core.errors import OutOfRangeError
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.core.request import StallCause
from pageframe.core.step import FinishReason, RefusedBecause, StepResult
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)


def bounded(ceiling: int, *, num_blocks: int = 64, asked: int | None = None, **fields) -> Driver:
    """A driver whose tenant `a` may hold ``ceiling`` blocks, and `b` as many as there are."""
    facts = make_facts(num_blocks=num_blocks, block_size=4)
    quota = TenantQuota(tenant="a", ceiling_blocks=ceiling if asked is None else asked)
    return Driver(
        facts=facts,
        engine=FakeEngine(facts, ceilings={"a": ceiling}),
        quotas=(quota,),
        lookahead=False,
        token_budget=64,
        **fields,
    )


def refusal(driver: Driver, submission) -> OutOfRangeError:
    with pytest.raises(OutOfRangeError) as refused:
        driver.submit(submission)
    assert refused.value.reason == "OVER_QUOTA"
    return refused.value


def test_what_a_ceiling_could_never_hold_is_refused_at_once_with_the_numbers():
    driver = bounded(3)
    error = refusal(driver, make_submission(1, 10, max_tokens=4, tenant="a"))
    assert error.limits == {
        "num_blocks_needed": "4",
        "num_blocks_max": "3",
        "num_blocks_of_others": "0",
    }
    driver.submit(make_submission(2, 10, max_tokens=3, tenant="a"))
    driver.submit(make_submission(3, 10, max_tokens=4, tenant="b"))
    driver.run()
    assert_scheduler_empty(driver)


def test_what_others_are_assured_of_is_out_of_reach():
    quotas = (
        TenantQuota(tenant="a", floor_blocks=5),
        TenantQuota(tenant="b", floor_blocks=6),
    )
    driver = Driver(facts=make_facts(num_blocks=16, block_size=4), quotas=quotas)
    error = refusal(driver, make_submission(1, 24, max_tokens=2, tenant="c"))
    assert (error.limits["num_blocks_max"], error.limits["num_blocks_of_others"]) == ("5", "11")
    driver.submit(make_submission(2, 24, max_tokens=2, tenant="a"))
    driver.run()
    assert_scheduler_empty(driver)


def test_floors_that_a_shrunk_pool_cannot_hold_leave_room_for_their_own_tenants():
    quotas = (
        TenantQuota(tenant="a", floor_blocks=24),
        TenantQuota(tenant="b", floor_blocks=8),
    )
    driver = Driver(facts=make_facts(num_blocks=16, block_size=4), quotas=quotas)
    error = refusal(driver, make_submission(1, 16, max_tokens=2, tenant="b"))
    assert (error.limits["num_blocks_max"], error.limits["num_blocks_of_others"]) == ("4", "12")
    refusal(driver, make_submission(2, 2, max_tokens=1, tenant="c"))
    driver.submit(make_submission(3, 44, max_tokens=2, tenant="a"))
    driver.run()
    assert_scheduler_empty(driver)


def test_who_is_refused_for_its_quota_holds_back_nobody_of_another_tenant():
    driver = bounded(3)
    for handle, tenant in ((1, "a"), (2, "a"), (3, "a"), (4, "b"), (5, "b")):
        driver.submit(make_submission(handle, 8, max_tokens=4, tenant=tenant))
    result = driver.step()
    assert dict(zip(result.refused_ids, result.refused_because, strict=True)) == {
        2: RefusedBecause.QUOTA,
        3: RefusedBecause.QUOTA,
    }
    assert driver.scheduler.snapshot().num_running == 3
    driver.run()
    assert driver.completion(2).stall_ns[StallCause.QUOTA] > 0
    assert StallCause.QUOTA not in driver.completion(4).stall_ns
    assert_scheduler_empty(driver)


def test_a_tenant_rests_until_one_of_its_sequences_is_over():
    driver = bounded(3)
    for handle, tenant in ((1, "a"), (2, "a"), (3, "a"), (4, "b")):
        driver.submit(make_submission(handle, 8, max_tokens=5, tenant=tenant))
    driver.run()
    # The first ends with step 5; then the second comes in, and the third is refused once more.
    asked = [[i for i in plan.may.sequence_ids if i != 4] for plan in driver.sent]
    assert asked == [[1, 2, 3], [], [], [], [], [2, 3], [], [], [], [], [3], [], [], [], []]
    assert_scheduler_empty(driver)


def test_a_tenant_is_asked_for_again_after_some_steps_though_nothing_of_it_ended():
    driver = bounded(0, asked=100)
    driver.submit(make_submission(1, 4, max_tokens=3, tenant="a"))
    driver.submit(make_submission(2, 4, max_tokens=30, tenant="b"))
    while len(driver.sent) < 12:
        driver.step()
    assert [plan.step for plan in driver.sent if 1 in plan.may.sequence_ids] == [1, 10]
    driver.engine.ceilings = {}
    driver.run()
    assert [plan.step for plan in driver.sent if 1 in plan.may.sequence_ids] == [1, 10, 19]
    assert_scheduler_empty(driver)


def test_nothing_is_asked_in_vain_while_nothing_else_runs():
    driver = bounded(0, asked=100)
    driver.submit(make_submission(1, 4, max_tokens=3, tenant="a"))
    assert driver.step().refused_because == [RefusedBecause.QUOTA]
    assert driver.send_plan() is None
    # The executor reports a change by itself: a pin has expired, a quota was raised.
    driver.engine.ceilings = {}
    driver.scheduler.on_result(StepResult(step=0, account=driver.engine.account()), 0)
    assert driver.send_plan().may.sequence_ids == [1]
    driver.run()
    assert_scheduler_empty(driver)


def test_a_ceiling_that_could_be_passed_has_victims_of_its_own_tenant():
    driver = bounded(5)
    for handle, tenant in ((1, "b"), (2, "a"), (3, "a"), (4, "b")):
        driver.submit(make_submission(handle, 7, max_tokens=6, tenant=tenant))
    while not driver.sent or not driver.sent[-1].victims.sequence_ids:
        driver.step()
    plan = driver.sent[-1]
    # Both of its sequences reach position 8: six blocks, and five are allowed.
    assert (plan.victims.sequence_ids, plan.victims.beneficiary_ids) == ([3], [2])
    assert driver.scheduler.snapshot().num_preempted == 1
    driver.run()
    assert driver.completion(3).account.num_preemptions == 1
    for handle in (1, 2, 3, 4):
        submission = make_submission(handle, 7, max_tokens=6)
        assert driver.output(handle) == expected_output(submission, driver.facts)
    assert_scheduler_empty(driver)


def test_victims_of_a_quota_keep_nobody_of_another_tenant_out():
    driver = bounded(5)
    for handle in (1, 2):
        driver.submit(make_submission(handle, 7, max_tokens=6, tenant="a"))
    while not driver.sent or not driver.sent[-1].victims.sequence_ids:
        driver.send_plan()
        driver.submit(make_submission(10 + len(driver.sent), 3, max_tokens=2, tenant="b"))
        driver.step()
    assert driver.sent[-1].may.sequence_ids
    driver.run()
    assert_scheduler_empty(driver)


def test_victims_are_named_by_an_upper_bound_and_taken_only_at_need():
    facts = make_facts(num_blocks=64, block_size=4)
    engine = FakeEngine(facts, ceilings={"a": 6}, shares_prefixes=True)
    driver = Driver(
        facts=facts,
        engine=engine,
        quotas=(TenantQuota(tenant="a", ceiling_blocks=6),),
        lookahead=False,
        token_budget=64,
    )
    driver.submit(make_submission(1, 13, max_tokens=3, num_samples=3, tenant="a"))
    driver.run()
    # Three shared blocks and one each are six; counted for each of them it would be twelve.
    assert any(plan.victims.sequence_ids for plan in driver.sent)
    assert [driver.reason(1, i) for i in range(3)] == [FinishReason.LENGTH] * 3
    assert sum(driver.completion(1, i).account.num_preemptions for i in range(3)) == 0
    assert_scheduler_empty(driver)


def test_prefills_that_hold_all_their_tenant_may_hold_do_not_wait_for_one_another_for_ever():
    driver = bounded(6, prefill_chunk_tokens=4)
    requests = [make_submission(handle, 20, max_tokens=4, tenant="a") for handle in (1, 2)]
    for request in requests:
        driver.submit(request)
    driver.submit(make_submission(3, 4, max_tokens=100, tenant="b"))
    while len(driver.completions) < 2:
        assert len(driver.sent) < 40
        driver.step()
    # Three blocks each and both want a fourth, while somebody else decodes on and on.
    (plan,) = [plan for plan in driver.sent if plan.must.sequence_ids]
    assert (plan.must.sequence_ids, plan.victims.sequence_ids) == ([1], [2])
    for request in requests:
        assert driver.output(request.handle) == expected_output(request, driver.facts)
    driver.run()
    assert_scheduler_empty(driver)


def test_the_account_of_a_report_counts():
    driver = bounded(3)
    driver.scheduler.on_result(StepResult(step=0, account=PoolAccount(total=64, free=3)), 0)
    driver.submit(make_submission(1, 8, max_tokens=4, tenant="b"))
    assert driver.scheduler.snapshot().account.free == 3
    driver.run()
    assert_scheduler_empty(driver)
