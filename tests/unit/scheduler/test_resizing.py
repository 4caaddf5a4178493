"""A pool that becomes smaller or larger while it serves."""

from dataclasses import replace

import pytest

from pageframe.core.errors import OutOfRangeError
from pageframe.core.step import FinishReason, StepResult
from pageframe.testing.fake_engine import make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_consistent,
    expected_output,
    make_submission,
)


def make_driver(num_blocks: int, **fields) -> Driver:
    return Driver(facts=make_facts(num_blocks=num_blocks, block_size=4), lookahead=False, **fields)


def resize(driver: Driver, num_blocks: int) -> None:
    """The executor changes its pool between two steps and says so."""
    driver.engine.facts = replace(driver.engine.facts, num_blocks=num_blocks)
    driver.results.append(StepResult(step=0, account=driver.engine.account()))
    driver.receive()
    assert_scheduler_consistent(driver.scheduler)


def test_what_fits_is_measured_by_the_pool_as_it_is():
    driver = make_driver(8)
    resize(driver, 4)
    with pytest.raises(OutOfRangeError, match="EXCEEDS_POOL") as refused:
        driver.submit(make_submission(1, 14, max_tokens=4))
    assert refused.value.limits["num_blocks"] == "4"
    resize(driver, 5)
    submission = make_submission(1, 14, max_tokens=4)
    driver.submit(submission)
    driver.run()
    assert driver.output(1) == expected_output(submission, driver.facts)


def test_the_watermark_grows_with_the_pool():
    driver = make_driver(8)
    assert driver.scheduler._roster.capacity.num_blocks_watermark == 1
    resize(driver, 201)
    assert driver.scheduler._roster.capacity.num_blocks_watermark == 3
    assert driver.scheduler.facts.num_blocks == 201


def test_a_waiting_request_that_cannot_fit_any_more_ends_with_the_numbers():
    driver = make_driver(16, max_num_running=1)
    driver.submit(make_submission(1, 4, max_tokens=9))
    driver.submit(make_submission(2, 30, max_tokens=3, num_samples=2))
    driver.submit(make_submission(3, 4, max_tokens=2))
    driver.step()
    resize(driver, 6)
    # It was announced, so the executor is told first; its sibling nobody knows.
    assert driver.completion(2, 1).error_reason == "EXCEEDS_POOL"
    assert driver.scheduler.take_cancels() == [2]
    driver.results.append(driver.engine.cancel([2]))
    driver.run()
    completion = driver.completion(2, 0)
    assert completion.finish_reason is FinishReason.ERROR
    assert (completion.error_status, completion.error_reason) == ("OUT_OF_RANGE", "EXCEEDS_POOL")
    assert completion.error_limits["num_blocks_needed"] == "8"
    assert completion.error_limits["num_blocks"] == "6"
    assert driver.reason(1) is driver.reason(3) is FinishReason.LENGTH


def test_a_running_request_may_come_to_its_end_in_time():
    driver = make_driver(16)
    submission = make_submission(1, 4, max_tokens=40)
    stop = expected_output(submission, driver.facts)[5]
    sampling = replace(submission.sampling, stop_token_ids=(stop,))
    driver.submit(make_submission(1, 4, sampling=sampling))
    driver.step()
    resize(driver, 4)
    driver.run()
    assert driver.reason(1) is FinishReason.STOP


def test_a_running_request_that_does_not_ends_when_it_loses_its_blocks():
    driver = make_driver(16)
    driver.submit(make_submission(1, 4, max_tokens=40))
    driver.step()
    resize(driver, 3)
    driver.run()
    completion = driver.completion(1)
    assert (completion.finish_reason, completion.error_reason) == (
        FinishReason.ERROR,
        "EXCEEDS_POOL",
    )
    # Three blocks of four hold twelve tokens; the newest is never computed.
    assert len(driver.output(1)) == 9


def test_a_pool_that_grows_takes_in_who_waited_for_blocks():
    driver = make_driver(8)
    for handle in (1, 2):
        driver.submit(make_submission(handle, 20, max_tokens=9))
    driver.step()
    assert driver.scheduler.snapshot().num_running == 1
    resize(driver, 20)
    driver.step()
    assert driver.scheduler.snapshot().num_running == 2
    driver.run()
    assert driver.reason(2) is FinishReason.LENGTH


def test_an_executor_that_comes_back_is_believed_about_its_pool():
    driver = make_driver(8)
    driver.lose_executor()
    account = replace(driver.engine.account(), total=12, free=12)
    driver.take(driver.scheduler.on_executor_ready(driver.facts, account, 5))
    assert driver.scheduler.facts.num_blocks == 12


def test_pinned_blocks_do_not_keep_a_newcomer_out_while_nobody_runs():
    """The executor lets pins give way to it, but only if it is asked."""
    driver = make_driver(8)
    account = replace(driver.engine.account(), free=1, held=7, pinned=7)
    driver.results.append(StepResult(step=0, account=account))
    driver.receive()
    driver.submit(make_submission(1, 14, max_tokens=2))
    plan = driver.scheduler.plan(driver.clock.now_ns())
    assert plan is not None
    assert plan.may.sequence_ids == [plan.announce[0].sequence_id]


def test_blocks_of_idle_chats_do_not_keep_a_newcomer_out_while_others_run():
    driver = make_driver(16)
    driver.submit(make_submission(1, 5, max_tokens=8))
    driver.step()
    account = replace(driver.engine.account(), free=1, held=15, pinned=10, yieldable=10)
    driver.results.append(StepResult(step=0, account=account))
    driver.receive()
    driver.submit(make_submission(2, 14, max_tokens=2))
    plan = driver.scheduler.plan(driver.clock.now_ns())
    assert plan is not None
    assert plan.may.sequence_ids == [plan.announce[0].sequence_id]
