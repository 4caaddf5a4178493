import pytest

from pageframe.core.request import StallCause
from pageframe.core.step import FinishReason
from pageframe.testing.fake_engine import make_facts
from unit.scheduler.driver import (
    GATEWAY,
    Driver,
    assert_scheduler_consistent,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)


@pytest.mark.parametrize("num_steps", range(6))
def test_the_death_of_an_executor_is_a_stall_and_not_an_error(num_steps):
    driver = Driver(token_budget=8, max_num_running=2)
    requests = [make_submission(handle, 6, max_tokens=4) for handle in (1, 2, 3)]
    for request in requests:
        driver.submit(request)
    for _ in range(num_steps):
        driver.step()
    driver.send_plan()
    driver.lose_executor()
    assert_scheduler_consistent(driver.scheduler)
    assert driver.scheduler.plan(driver.clock.now_ns()) is None
    driver.clock.advance_ns(5_000_000)
    num_sent = len(driver.sent)
    driver.start_executor()
    driver.run()
    assert (driver.sent[num_sent].step, driver.sent[num_sent].builds_on) == (1, 0)
    for request in requests:
        assert driver.output(request.handle) == expected_output(request, driver.facts)
    assert driver.completion(3).stall_ns[StallCause.EXECUTOR_LOST] >= 5_000_000
    assert_scheduler_empty(driver)


def test_what_ran_is_announced_anew_with_its_output_and_a_higher_generation():
    driver = Driver(lookahead=False)
    driver.submit(make_submission(1, [5, 6, 7], max_tokens=9))
    driver.step()
    driver.step()
    output = list(driver.output(1))
    driver.lose_executor()
    driver.start_executor()
    plan = driver.send_plan()
    (announcement,) = plan.announce
    assert list(announcement.token_ids) == [5, 6, 7, *output]
    assert (announcement.num_prompt_tokens, announcement.generation) == (3, 1)
    assert (plan.may.generations, plan.may.num_tokens) == ([1], [5])


def test_a_cancel_that_was_under_way_is_done_when_the_executor_is_gone():
    driver = Driver()
    driver.submit(make_submission(1, max_tokens=9))
    driver.step()
    driver.take(driver.scheduler.cancel(GATEWAY, 1))
    driver.lose_executor()
    assert driver.reason(1) is FinishReason.CANCELLED
    driver.start_executor()
    assert_scheduler_empty(driver)


def test_requests_come_in_and_expire_while_there_is_no_executor():
    driver = Driver()
    driver.lose_executor()
    driver.submit(make_submission(1, deadline_ns=2_000_000))
    driver.submit(make_submission(2))
    driver.clock.advance_ns(1_000_000)
    driver.take(driver.scheduler.expire(driver.clock.now_ns()))
    assert driver.reason(1) is FinishReason.DEADLINE
    driver.start_executor()
    driver.run()
    assert driver.completion(2).stall_ns[StallCause.EXECUTOR_LOST] == 1_000_000
    assert_scheduler_empty(driver)


def test_a_smaller_executor_ends_what_it_could_never_serve_and_serves_the_rest():
    driver = Driver(facts=make_facts(num_blocks=16, block_size=4), token_budget=64)
    driver.submit(make_submission(1, 30, max_tokens=20))
    driver.submit(make_submission(2, 4, max_tokens=5))
    driver.step()
    driver.lose_executor()
    driver.facts = make_facts(num_blocks=8, block_size=8, max_model_len=49)
    driver.start_executor()
    driver.run()
    completion = driver.completion(1)
    assert completion.finish_reason is FinishReason.ERROR
    assert completion.error_reason == "CONTEXT_TOO_LONG"
    assert driver.reason(2) is FinishReason.LENGTH
    assert driver.scheduler.snapshot().account.total == 8
    assert_scheduler_empty(driver)


def test_a_lost_executor_is_no_preemption():
    driver = Driver()
    driver.submit(make_submission(1, max_tokens=9))
    driver.step()
    driver.lose_executor()
    driver.start_executor()
    driver.run()
    assert driver.completion(1).account.num_preemptions == 0
