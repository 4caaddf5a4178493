"""Steered sequences: every token is asked for, one plan at a time, and in all else like others."""

import pytest

from pageframe.core.plan import Recovery
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.testing.fake_engine import make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_consistent,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)
from unit.scheduler.test_tracing import Spans


def must_of(driver: Driver) -> list[list[tuple[int, int]]]:
    """Sequence and tokens of each ``must`` entry, plan by plan."""
    return [
        list(zip(plan.must.sequence_ids, plan.must.num_tokens, strict=True)) for plan in driver.sent
    ]


def test_each_token_is_asked_for():
    driver = Driver()
    submission = make_submission(1, 4, max_tokens=4)
    driver.submit(submission, is_steered=True)
    driver.run()
    assert driver.output(1) == expected_output(submission, driver.facts)
    assert driver.reason(1) is FinishReason.LENGTH
    # The first token comes with the prompt.
    assert must_of(driver) == [[], [(1, 1)], [(1, 1)], [(1, 1)]]
    assert driver.sent[0].announce[0].is_steered
    assert driver.engine.steps == [4, 1, 1, 1]
    assert_scheduler_empty(driver)


def test_plans_are_made_one_at_a_time_while_one_runs():
    driver = Driver()
    driver.submit(make_submission(1, 4, max_tokens=4))
    assert driver.send_plan() is not None
    assert driver.send_plan() is not None
    driver.submit(make_submission(2, 4, max_tokens=2), is_steered=True)
    assert len(driver.plans) == 2
    driver.run_engine()
    driver.receive()
    # Its prompt will be complete with this plan, and what comes then follows from its result.
    assert driver.send_plan().may.sequence_ids == [2]
    assert driver.send_plan() is None
    driver.run_engine()
    driver.receive()
    assert driver.send_plan() is None
    driver.run()
    assert_scheduler_empty(driver)


def test_look_ahead_comes_back_when_it_has_ended():
    driver = Driver()
    driver.submit(make_submission(1, 4, max_tokens=2), is_steered=True)
    driver.submit(make_submission(2, 4, max_tokens=20))
    while 1 in driver.scheduler._roster.sequences:
        driver.step()
        assert_scheduler_consistent(driver.scheduler)
    assert driver.send_plan() is not None
    assert driver.send_plan() is not None
    driver.run()
    assert driver.output(2) == expected_output(make_submission(2, 4, max_tokens=20), driver.facts)


def test_its_tokens_come_first_in_the_token_budget():
    driver = Driver(token_budget=3, max_num_running=3)
    driver.submit(make_submission(1, 3, max_tokens=12), is_steered=True)
    driver.submit(make_submission(2, 3, max_tokens=12), is_steered=True)
    driver.submit(make_submission(3, 9, max_tokens=1))
    driver.run()
    # Two steered tokens leave one of three for the long prompt, and no step is larger than that.
    assert max(driver.engine.steps) == 3
    plans = [plan for plan in driver.sent if plan.must.sequence_ids == [1, 2]]
    assert [plan.may.num_tokens for plan in plans[:8]] == [[1]] * 8
    assert_scheduler_empty(driver)


@pytest.mark.parametrize("recovery", list(Recovery))
def test_it_gives_way_and_comes_back(recovery):
    facts = make_facts(num_blocks=6, block_size=4, num_host_blocks=6)
    driver = Driver(facts=facts, recovery=recovery)
    submissions = [make_submission(handle, 7, max_tokens=9) for handle in (1, 2)]
    for submission in submissions:
        driver.submit(submission, is_steered=True)
    driver.run()
    for submission in submissions:
        assert driver.output(submission.handle) == expected_output(submission, facts)
    assert [driver.completion(h).account.num_preemptions for h in (1, 2)] == [0, 1]
    assert_scheduler_empty(driver)


def test_blocks_of_its_next_token_are_promised_to_nobody_else():
    facts = make_facts(num_blocks=4, block_size=4)
    driver = Driver(facts=facts)
    driver.submit(make_submission(1, 8, max_tokens=8), is_steered=True)
    driver.step()
    # It holds two blocks and needs a third now; two are free, the newcomer would take one and one
    # more has to be left.
    driver.submit(make_submission(2, 4, max_tokens=1))
    driver.step()
    assert driver.sent[-1].may.sequence_ids == []
    driver.run()
    assert driver.completion(1).account.num_preemptions == 0
    assert_scheduler_empty(driver)


def test_a_refused_plan_is_asked_again():
    driver = Driver()
    submission = make_submission(1, 4, max_tokens=4)
    driver.submit(submission, is_steered=True)
    driver.step()
    driver.send_plan()
    driver.run_engine(refuse=True)
    assert driver.receive().refusal
    assert_scheduler_consistent(driver.scheduler)
    driver.run()
    assert driver.output(1) == expected_output(submission, driver.facts)
    assert must_of(driver) == [[], [(1, 1)], [(1, 1)], [(1, 1)], [(1, 1)]]
    assert_scheduler_empty(driver)


def test_a_cancel_reaches_it_between_two_plans():
    driver = Driver()
    driver.submit(make_submission(1, 4, max_tokens=9), is_steered=True)
    driver.step()
    driver.take(driver.scheduler.cancel(1, 1))
    driver.run()
    assert driver.reason(1) is FinishReason.CANCELLED
    assert_scheduler_empty(driver)


def test_the_executor_may_be_lost():
    driver = Driver()
    submission = make_submission(1, 4, max_tokens=6)
    driver.submit(submission, is_steered=True)
    driver.step()
    driver.step()
    driver.send_plan()
    driver.lose_executor()
    driver.start_executor()
    driver.run()
    assert driver.output(1) == expected_output(submission, driver.facts)
    assert_scheduler_empty(driver)


def test_copies_that_its_next_token_makes_are_counted_once():
    driver = Driver()
    driver.submit(make_submission(1, 6, max_tokens=9), is_steered=True)
    driver.step()
    steered = driver.scheduler._roster.steered
    steered.num_copies = 3
    driver.send_plan()
    (flight,) = driver.scheduler._flights._flights
    assert flight.num_blocks == 3
    assert steered.num_copies == 0
    driver.run()


def test_decode_spans_are_cut_at_their_longest():
    spans = Spans()
    facts = make_facts(num_blocks=100, max_model_len=400)
    driver = Driver(facts=facts, trace=spans)
    sampling = SamplingParams(temperature=0.0, max_tokens=300)
    driver.submit(
        make_submission(1, 4, sampling=sampling, trace_id=b"t" * 16, span_id=b"s" * 8),
        is_steered=True,
    )
    driver.run()
    begins, ends = (
        [span.attributes[f"pageframe.tokens.{edge}"] for span in spans.named("decode")]
        for edge in ("begin", "end")
    )
    assert (begins[0], ends[-1]) == (4, 303)
    assert begins[1:] == ends[:-1]
    assert max(end - begin for begin, end in zip(begins, ends, strict=True)) == 128
