import pytest

from pageframe.core.errors import InternalError
from pageframe.core.plan import Recovery, StepPlan
from pageframe.core.request import StallCause
from pageframe.core.step import FinishReason, StepResult
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)


def victims(plan: StepPlan) -> list[int]:
    return plan.victims.sequence_ids


class GreedyPool(FakeEngine):
    """Says that more blocks are free than there are, until it is found out."""

    num_imagined = 0

    def account(self):
        account = super().account()
        return type(account)(
            total=account.total + self.num_imagined,
            free=account.free + self.num_imagined,
            held=account.held,
        )


def assert_outputs(driver: Driver, *submissions) -> None:
    for submission in submissions:
        assert driver.output(submission.handle) == expected_output(submission, driver.facts)


def test_the_one_that_joined_last_gives_way_and_the_oldest_benefits():
    driver = Driver(facts=make_facts(num_blocks=6, block_size=4), lookahead=False, token_budget=64)
    requests = [make_submission(handle, 3, max_tokens=12) for handle in (1, 2, 3)]
    for request in requests:
        driver.submit(request)
    while not any(victims(plan) for plan in driver.sent):
        driver.step()
    plan = driver.sent[-1]
    # Three sequences hold two blocks each; all three reach position 8 in this step.
    assert victims(plan) == [3, 2]
    assert plan.victims.beneficiary_ids == [1, 1]
    assert plan.victims.recoveries == [Recovery.RECOMPUTE] * 2
    assert driver.scheduler.snapshot().num_preempted == 1
    assert driver.engine.sequences[3].generation == 1
    driver.run()
    assert_outputs(driver, *requests)
    assert driver.completion(3).account.num_preemptions >= 1
    assert driver.completion(1).account.num_preemptions == 0
    assert_scheduler_empty(driver)


def test_no_victim_is_named_while_blocks_are_enough():
    driver = Driver(facts=make_facts(num_blocks=32, block_size=4), token_budget=64)
    for handle in range(1, 9):
        driver.submit(make_submission(handle, 4, max_tokens=8))
    driver.run()
    assert not any(victims(plan) for plan in driver.sent)


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("token_budget", [1, 7, 64])
def test_a_pool_for_one_request_serves_many(lookahead, block_size, token_budget):
    facts = make_facts(num_blocks=32 // block_size, block_size=block_size)
    driver = Driver(facts=facts, lookahead=lookahead, token_budget=token_budget, max_num_running=20)
    requests = [make_submission(handle, 2 + handle, max_tokens=31 - handle) for handle in range(20)]
    for request in requests:
        driver.submit(request)
    num_plans = driver.run()
    assert num_plans > 0
    assert_outputs(driver, *requests)
    assert_scheduler_empty(driver)


def test_a_forecast_that_looks_one_step_ahead_is_never_refused():
    driver = Driver(facts=make_facts(num_blocks=8, block_size=2), token_budget=32)
    for handle in range(1, 9):
        driver.submit(make_submission(handle, handle, max_tokens=8))
    refusals = []
    while not driver.scheduler.is_idle:
        refusals.append(driver.step().refusal)
    assert any(victims(plan) for plan in driver.sent)
    assert set(refusals) == {""}


def test_preempted_sequences_come_back_before_new_ones_oldest_first():
    driver = Driver(facts=make_facts(num_blocks=6, block_size=4), token_budget=64)
    for handle in (1, 2, 3):
        driver.submit(make_submission(handle, 3, max_tokens=14))
    while driver.scheduler.snapshot().num_preempted < 2:
        driver.step()
    driver.submit(make_submission(4, 1, max_tokens=1))
    num_sent = len(driver.sent)
    driver.run()
    admitted = [i for plan in driver.sent[num_sent:] for i in plan.may.sequence_ids]
    assert admitted.index(2) < admitted.index(3) < admitted.index(4)


def test_who_was_thrown_out_comes_back_only_when_it_has_cooled():
    driver = Driver(facts=make_facts(num_blocks=30, block_size=1), token_budget=64, lookahead=False)
    for handle, num_tokens, max_tokens in ((1, 2, 18), (2, 10, 8), (3, 2, 20)):
        driver.submit(make_submission(handle, num_tokens, max_tokens=max_tokens))
    driver.run()
    # Step 7 needs 32 blocks. Step 8 ends the second, so there is room for what the third has, but
    # not for what it will come to; eight steps later it is taken back as it is.
    assert [plan.step for plan in driver.sent if victims(plan)] == [7]
    assert [plan.step for plan in driver.sent if 3 in plan.may.sequence_ids] == [1, 16]
    assert driver.completion(3).account.num_preemptions == 1


def test_a_preempted_sequence_waits_for_a_measured_time():
    driver = Driver(facts=make_facts(num_blocks=4, block_size=4), token_budget=64)
    for handle in (1, 2):
        driver.submit(make_submission(handle, 3, max_tokens=10))
    driver.run()
    assert driver.completion(2).stall_ns[StallCause.PREEMPTED] > 0
    assert StallCause.PREEMPTED not in driver.completion(1).stall_ns


class SharedPool(FakeEngine):
    """Some of its blocks are held by somebody whom the scheduler does not know."""

    num_foreign = 0

    @property
    def num_free(self) -> int:
        return super().num_free - self.num_foreign


@pytest.mark.parametrize("lookahead", [True, False])
def test_a_prefill_that_cannot_grow_is_given_up_rather_than_tried_for_ever(lookahead):
    engine = SharedPool(make_facts(num_blocks=8, block_size=4))
    driver = Driver(facts=engine.facts, engine=engine, token_budget=8, lookahead=lookahead)
    request = make_submission(1, 28, max_tokens=3)
    driver.submit(request)
    driver.step()
    engine.num_foreign = 6
    while driver.step() is not None:
        assert len(driver.sent) < 20
    # Refused in `may`, then in `must`, then even the oldest is a victim; then it waits.
    assert any(plan.must.sequence_ids == [1] for plan in driver.sent)
    assert victims(driver.sent[-1]) == [1]
    assert driver.scheduler.snapshot().num_preempted == 1
    engine.num_foreign = 0
    driver.results.append(engine.cancel([]))
    driver.run()
    assert_outputs(driver, request)
    assert driver.completion(1).stall_ns[StallCause.KV_FULL] > 0
    assert_scheduler_empty(driver)


def test_prefills_that_hold_one_another_up_are_found_behind_an_empty_step_too():
    """The step planned ahead has nothing to do; its result comes in the same moment."""
    engine = SharedPool(make_facts(num_blocks=8, block_size=4))
    driver = Driver(facts=engine.facts, engine=engine, token_budget=8, prefill_chunk_tokens=4)
    requests = [make_submission(handle, 7, max_tokens=2) for handle in (1, 2)]
    for request in requests:
        driver.submit(request)
    driver.step()
    engine.num_foreign = 6
    while driver.send_plan() is not None or driver.plans:
        assert len(driver.sent) < 40
        driver.send_plan()
        while driver.plans:
            driver.run_engine()
        while driver.results:
            driver.receive()
    assert driver.completion(1).finish_reason is FinishReason.LENGTH
    engine.num_foreign = 0
    driver.results.append(engine.cancel([]))
    driver.run()
    assert_outputs(driver, *requests)
    assert any(plan.must.sequence_ids == [1] for plan in driver.sent)
    assert_scheduler_empty(driver)


def test_a_refused_plan_is_planned_again_on_the_last_step_that_was_applied():
    driver = Driver(token_budget=8)
    request = make_submission(1, 20, max_tokens=4)
    driver.submit(request)
    driver.send_plan()
    driver.send_plan()
    driver.run_engine(refuse=True)
    driver.receive()
    # The second one builds on the refused one, so it has to come back first.
    assert driver.send_plan() is None
    driver.run_engine()
    assert driver.receive().refusal == "BUILDS_ON_UNAPPLIED_STEP"
    plan = driver.send_plan()
    assert (plan.step, plan.builds_on) == (3, 0)
    assert [announcement.sequence_id for announcement in plan.announce] == [1]
    assert plan.may.num_tokens == [8]
    driver.run()
    assert_outputs(driver, request)
    assert_scheduler_empty(driver)


def test_after_a_refusal_for_want_of_blocks_all_but_the_oldest_may_go():
    engine = GreedyPool(make_facts(num_blocks=6, block_size=4))
    driver = Driver(facts=engine.facts, engine=engine, token_budget=64, lookahead=False)
    requests = [make_submission(handle, 3, max_tokens=12) for handle in (1, 2, 3)]
    for request in requests:
        driver.submit(request)
    engine.num_imagined = 6
    refused = None
    while refused is None or not refused.refusal:
        refused = driver.step()
    assert refused.refusal == "MUST_DOES_NOT_FIT"
    assert victims(driver.sent[-1]) == []
    driver.step()
    assert victims(driver.sent[-1]) == [3, 2]
    engine.num_imagined = 0
    driver.run()
    assert_outputs(driver, *requests)
    assert_scheduler_empty(driver)


def test_after_a_second_refusal_even_the_oldest_may_go():
    engine = SharedPool(make_facts())
    driver = Driver(facts=engine.facts, engine=engine, lookahead=False)
    for handle in (1, 2):
        driver.submit(make_submission(handle, 3, max_tokens=12))
    driver.step()
    for expected in ([], [2], [2, 1]):
        assert victims(driver.send_plan()) == expected
        engine.num_foreign += 5
        driver.run_engine(refuse=True)
        driver.receive()
        assert driver.scheduler.snapshot().account.free == engine.num_free


def test_nobody_comes_in_while_somebody_may_have_to_go():
    driver = Driver(lookahead=False)
    for handle in (1, 2):
        driver.submit(make_submission(handle, 3, max_tokens=12))
    driver.step()
    driver.submit(make_submission(3))
    driver.send_plan()
    driver.run_engine(refuse=True)
    driver.receive()
    plan = driver.send_plan()
    assert (victims(plan), plan.may.sequence_ids) == ([2], [])
    driver.run_engine()
    driver.receive()
    assert driver.send_plan().may.sequence_ids == [3]


def test_an_executor_that_refuses_everything_is_given_up():
    driver = Driver(lookahead=False)
    driver.submit(make_submission(1))
    for _ in range(8):
        driver.send_plan()
        driver.run_engine(refuse=True)
        driver.receive()
    driver.send_plan()
    driver.run_engine(refuse=True)
    with pytest.raises(InternalError, match="PLAN_REFUSED"):
        driver.receive()


def test_a_result_out_of_order_is_not_believed():
    driver = Driver()
    driver.submit(make_submission(1))
    driver.send_plan()
    with pytest.raises(InternalError, match="step 2; step 1 was expected"):
        driver.scheduler.on_result(StepResult(step=2), 0)
