import pytest

from pageframe.core.request import Delivery, StallCause
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, StepResult
from pageframe.testing.fake_engine import make_facts
from unit.scheduler.driver import (
    GATEWAY,
    Driver,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)


def cancel(driver: Driver, handle: int, gateway_id: int = GATEWAY) -> None:
    driver.take(driver.scheduler.cancel(gateway_id, handle))


def test_what_the_executor_never_heard_of_ends_at_once():
    driver = Driver()
    driver.submit(make_submission(1))
    cancel(driver, 1)
    assert driver.reason(1) is FinishReason.CANCELLED
    assert driver.sent == []
    assert_scheduler_empty(driver)


def test_a_running_request_is_released_before_its_completion():
    driver = Driver()
    driver.submit(make_submission(1, max_tokens=50))
    driver.step()
    driver.step()
    cancel(driver, 1)
    assert driver.completions == {}
    assert driver.scheduler.take_cancels() == [1]
    assert driver.scheduler.take_cancels() == []
    driver.results.append(driver.engine.cancel([1]))
    driver.receive()
    assert driver.reason(1) is FinishReason.CANCELLED
    assert driver.completion(1).account.num_blocks_peak == 2
    driver.run()
    assert_scheduler_empty(driver)


def test_a_cancel_waits_for_the_announcement_to_be_heard():
    """It would overtake the plan in the executor, find nothing, and leave a ghost behind."""
    driver = Driver()
    driver.submit(make_submission(1, max_tokens=50))
    driver.send_plan()
    cancel(driver, 1)
    assert driver.scheduler.take_cancels() == []
    # It may start in the step in flight, so nothing is planned over its head.
    driver.submit(make_submission(2))
    assert driver.send_plan() is None
    driver.run_engine()
    driver.receive()
    assert driver.scheduler.take_cancels() == [1]
    driver.results.append(driver.engine.cancel([1]))
    driver.run()
    assert [driver.reason(1), driver.reason(2)] == [FinishReason.CANCELLED, FinishReason.LENGTH]
    assert driver.output(1) == []
    assert_scheduler_empty(driver)


def test_a_cancelled_announcement_that_was_refused_ends_without_the_executor():
    driver = Driver()
    driver.submit(make_submission(1))
    driver.send_plan()
    cancel(driver, 1)
    driver.run_engine(refuse=True)
    driver.receive()
    assert driver.reason(1) is FinishReason.CANCELLED
    assert_scheduler_empty(driver)


def test_an_announced_request_that_waits_can_be_cancelled():
    driver = Driver(max_num_running=1, lookahead=False)
    driver.submit(make_submission(1, max_tokens=9))
    driver.submit(make_submission(2, max_tokens=9))
    driver.step()
    assert 2 in driver.engine.sequences
    cancel(driver, 2)
    driver.run()
    assert [driver.reason(1), driver.reason(2)] == [FinishReason.LENGTH, FinishReason.CANCELLED]
    assert_scheduler_empty(driver)


def test_a_preempted_request_can_be_cancelled():
    driver = Driver(facts=make_facts(num_blocks=4, block_size=4), token_budget=64)
    for handle in (1, 2):
        driver.submit(make_submission(handle, 3, max_tokens=10))
    while not driver.scheduler.snapshot().num_preempted:
        driver.step()
    cancel(driver, 2)
    driver.run()
    assert driver.reason(2) is FinishReason.CANCELLED
    assert driver.completion(2).account.num_preemptions == 1
    assert_scheduler_empty(driver)


def test_an_end_that_crosses_the_cancel_completes_once():
    driver = Driver()
    driver.submit(make_submission(1, max_tokens=2))
    driver.send_plan()
    driver.send_plan()
    driver.run_engine()
    driver.receive()
    driver.run_engine()
    cancel(driver, 1)
    assert driver.scheduler.take_cancels() == [1]
    driver.results.append(driver.engine.cancel([1]))
    driver.run()
    assert driver.reason(1) is FinishReason.CANCELLED
    assert len(driver.output(1)) == 1
    assert_scheduler_empty(driver)


def test_a_cancel_of_what_is_over_or_unknown_does_nothing():
    driver = Driver()
    driver.submit(make_submission(1))
    driver.run()
    cancel(driver, 1)
    cancel(driver, 77)
    assert driver.reason(1) is FinishReason.LENGTH
    assert_scheduler_empty(driver)


def test_a_second_cancel_changes_nothing():
    driver = Driver()
    driver.submit(make_submission(1, max_tokens=50))
    driver.step()
    cancel(driver, 1)
    driver.take(driver.scheduler.cancel(GATEWAY, 1, FinishReason.DEADLINE))
    assert driver.scheduler.take_cancels() == [1]
    driver.results.append(driver.engine.cancel([1]))
    driver.run()
    assert driver.reason(1) is FinishReason.CANCELLED


def test_a_gateway_that_vanishes_takes_all_its_requests_along():
    driver = Driver(max_num_running=2)
    for handle in (1, 2, 3):
        driver.submit(make_submission(handle, max_tokens=20, request_id=f"a{handle}"))
        driver.submit(make_submission(handle, max_tokens=5, request_id=f"b{handle}"), gateway_id=2)
    driver.step()
    driver.take(driver.scheduler.cancel_gateway(GATEWAY))
    driver.run()
    for handle in (1, 2, 3):
        assert driver.reason(handle) is FinishReason.CANCELLED
        assert driver.completion(handle, gateway_id=2).finish_reason is FinishReason.LENGTH
    assert_scheduler_empty(driver)


def test_a_stop_string_ends_one_sample_and_the_others_go_on():
    driver = Driver()
    submission = make_submission(1, max_tokens=9, num_samples=2)
    driver.submit(submission)
    driver.step()
    driver.step()
    driver.take(driver.scheduler.finish_sample(GATEWAY, 1, 0))
    driver.take(driver.scheduler.finish_sample(GATEWAY, 1, 7))
    driver.run()
    assert [driver.reason(1, 0), driver.reason(1, 1)] == [FinishReason.STOP, FinishReason.LENGTH]
    assert driver.output(1, 1) == expected_output(submission, driver.facts)
    assert len(driver.output(1, 0)) == 2
    assert_scheduler_empty(driver)


def test_tokens_that_were_held_back_are_delivered_with_a_cancel():
    driver = Driver()
    driver.submit(make_submission(1, max_tokens=9, delivery=Delivery.FINAL))
    driver.step()
    driver.step()
    assert driver.messages == []
    cancel(driver, 1)
    driver.run()
    assert len(driver.output(1)) == driver.completion(1).num_output_tokens == 2


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_deadline_ends_a_request_in_any_state(num_steps):
    driver = Driver(max_num_running=1)
    for handle in (1, 2):
        driver.submit(make_submission(handle, max_tokens=50, deadline_ns=6_000_000))
    driver.submit(make_submission(3, max_tokens=5, deadline_ns=10**12))
    for _ in range(num_steps):
        driver.step()
    assert driver.scheduler.next_deadline_ns == 6_000_000
    driver.clock.advance_ns(6_000_000 - driver.clock.now_ns())
    driver.run()
    for handle in (1, 2):
        completion = driver.completion(handle)
        assert completion.finish_reason is FinishReason.DEADLINE
        assert completion.error_status == "DEADLINE_EXCEEDED"
        assert completion.error_reason == "DEADLINE_PASSED"
        assert completion.error_limits["deadline_ns"] == "6000000"
    assert driver.reason(3) is FinishReason.LENGTH
    assert driver.completion(2).stall_ns[StallCause.QUEUE] > 0
    assert_scheduler_empty(driver)


def test_a_sequence_that_the_executor_gives_up_ends_with_an_error_and_no_token():
    driver = Driver(lookahead=False)
    driver.submit(make_submission(1, max_tokens=9))
    driver.step()
    driver.send_plan()
    driver.run_engine()
    result = driver.results[0]
    result.token_ids, result.finish_reasons = [-1], [FinishReason.ERROR]
    driver.engine.cancel([1])
    driver.run()
    completion = driver.completion(1)
    assert (completion.finish_reason, completion.error_status) == (FinishReason.ERROR, "INTERNAL")
    assert completion.error_reason == "SEQUENCE_FAILED"
    assert len(driver.output(1)) == 1
    assert_scheduler_empty(driver)


@pytest.mark.parametrize(
    ("reason", "status", "text"),
    [
        ("HANDLE_UNKNOWN", "NOT_FOUND", "no prefix is retained under handle 'rules'"),
        ("PREFIX_MISMATCH", "INVALID_ARGUMENT", "does not begin with the prefix retained"),
        ("GRAMMAR_UNAVAILABLE", "UNIMPLEMENTED", "cannot hold outputs to a grammar"),
        ("GRAMMAR_TOO_COMPLEX", "INVALID_ARGUMENT", "too much time or memory to follow"),
        ("GRAMMAR_MISMATCH", "INVALID_ARGUMENT", "does not follow the grammar"),
        ("BLOCK_BROKEN", "INTERNAL", "gave up this sequence"),
    ],
)
def test_an_end_with_an_error_says_why(reason, status, text):
    driver = Driver(lookahead=False)
    driver.submit(make_submission(1, max_tokens=9, prefix_handle="rules"))
    driver.send_plan()
    assert driver.sent[0].announce[0].prefix_handle == "rules"
    result = StepResult(
        step=1,
        sampled_ids=[1],
        token_ids=[-1],
        finish_reasons=[FinishReason.ERROR],
        errors={1: reason},
        account=driver.engine.account(),
    )
    driver.take(driver.scheduler.on_result(result, driver.clock.now_ns()))
    completion = driver.completion(1)
    assert completion.finish_reason is FinishReason.ERROR
    assert (completion.error_status, completion.error_reason) == (status, reason)
    assert text in completion.error_message
    assert driver.scheduler.is_idle


def test_stop_tokens_end_a_sequence_and_are_part_of_the_output():
    driver = Driver()
    plain = expected_output(make_submission(1, max_tokens=9), driver.facts)
    sampling = SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=(plain[3],))
    driver.submit(make_submission(1, sampling=sampling))
    driver.run()
    assert (driver.reason(1), driver.output(1)) == (FinishReason.STOP, plain[:4])
    # One step more was on its way already.
    assert len(driver.sent) <= 5
    assert_scheduler_empty(driver)
