"""Samples of one request: sample 0 computes the prompt, the others fork from it."""

import pytest

from pageframe.core.plan import StepPlan
from pageframe.core.request import StallCause
from pageframe.core.step import FinishReason
from pageframe.scheduler.sequence import SequenceState
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import (
    GATEWAY,
    Driver,
    assert_scheduler_consistent,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)
from unit.scheduler.test_preemption import SharedPool, victims
from unit.scheduler.test_tracing import submit, traced


def children(plan: StepPlan) -> list[int]:
    return [child_id for fork in plan.forks for child_id in fork.child_ids]


def entries(plan: StepPlan) -> list[tuple[int, int]]:
    return list(zip(plan.may.sequence_ids, plan.may.num_tokens, strict=True))


def states(driver: Driver) -> list[str]:
    return [sequence.state.value for sequence in driver.scheduler.snapshot().sequences]


def assert_outputs(driver: Driver, submission, num_samples: int) -> None:
    expected = expected_output(submission, driver.facts)
    assert [driver.output(submission.handle, i) for i in range(num_samples)] == (
        [expected] * num_samples
    )
    assert_scheduler_empty(driver)


def test_all_samples_take_their_first_token_in_the_step_that_completes_the_prompt():
    driver = Driver(lookahead=False)
    submission = make_submission(1, 6, max_tokens=4, num_samples=3)
    driver.submit(submission)
    result = driver.step()
    assert [a.sequence_id for a in driver.sent[0].announce] == [1]
    assert children(driver.sent[0]) == [2, 3]
    assert (result.sampled_ids, result.forked_ids) == ([1, 2, 3], [2, 3])
    assert states(driver) == ["running"] * 3
    # Two shared blocks; in the next step two of three copy the second one.
    assert driver.engine.pool.num_held == 2
    driver.step()
    assert driver.engine.pool.num_held == 4
    driver.run()
    assert not any(plan.announce or plan.may for plan in driver.sent[1:])
    copies = [driver.completion(1, i).account.num_copies_on_write for i in range(3)]
    assert sorted(copies) == [0, 1, 1]
    assert [driver.completion(1, i).account.num_blocks_saved for i in (1, 2)] == [1, 2]
    assert_outputs(driver, submission, 3)


def test_a_prompt_that_fills_its_blocks_needs_no_copies():
    driver = Driver()
    submission = make_submission(1, 8, max_tokens=4, num_samples=4)
    driver.submit(submission)
    driver.run()
    assert sum(driver.completion(1, i).account.num_copies_on_write for i in range(4)) == 0
    assert_outputs(driver, submission, 4)


@pytest.mark.parametrize("num_prompt_tokens", [1, 2, 7, 8, 9, 24])
@pytest.mark.parametrize("token_budget", [1, 3, 8, 64])
@pytest.mark.parametrize("lookahead", [True, False])
def test_samples_do_not_depend_on_chunks(num_prompt_tokens, token_budget, lookahead):
    driver = Driver(token_budget=token_budget, lookahead=lookahead)
    submission = make_submission(1, num_prompt_tokens, max_tokens=9, num_samples=4)
    driver.submit(submission)
    driver.run()
    if token_budget >= 4 and not (lookahead and num_prompt_tokens % token_budget == 1):
        assert sum(len(children(plan)) for plan in driver.sent) == 3
        assert len(driver.engine.steps) < 9 + num_prompt_tokens
    assert_outputs(driver, submission, 4)


@pytest.mark.parametrize(("num_tokens", "is_admitted"), [(3, True), (5, False)])
def test_the_blocks_that_siblings_will_write_to_are_promised_to_nobody_else(
    num_tokens, is_admitted
):
    driver = Driver(facts=make_facts(num_blocks=6, block_size=4), token_budget=64)
    driver.submit(make_submission(1, 6, max_tokens=2, num_samples=3))
    driver.submit(make_submission(2, num_tokens, max_tokens=1))
    first, second = driver.send_plan(), driver.send_plan()
    # Two blocks for the prompt, two for siblings, one is kept: one is left.
    assert entries(first) == [(1, 6), (4, num_tokens)][: 1 + is_admitted]
    assert driver.scheduler._flights._flights[1].num_blocks == 2
    assert victims(second) == []
    driver.run()
    assert_scheduler_empty(driver)


def test_a_plan_that_was_refused_forks_again_and_copies_are_counted_once():
    driver = Driver()
    submission = make_submission(1, 6, max_tokens=4, num_samples=3)
    driver.submit(submission)
    driver.send_plan()
    driver.send_plan()
    for _ in range(2):
        driver.run_engine(refuse=True)
        driver.receive()
    assert states(driver) == ["waiting", "sibling", "sibling"]
    assert_scheduler_consistent(driver.scheduler)
    assert children(driver.send_plan()) == [2, 3]
    driver.send_plan()
    assert driver.scheduler._flights._flights[1].num_blocks == 2
    driver.run()
    assert_outputs(driver, submission, 3)


def test_as_many_fork_as_may_run_and_the_rest_go_the_way_of_any_request():
    driver = Driver(max_num_running=3, lookahead=False)
    submission = make_submission(1, 6, max_tokens=3, num_samples=5)
    driver.submit(submission)
    driver.step()
    assert children(driver.sent[0]) == [2, 3]
    assert states(driver) == ["running"] * 3 + ["waiting"] * 2
    driver.run()
    announced = [a.sequence_id for plan in driver.sent for a in plan.announce]
    assert announced == [1, 4, 5]
    assert_outputs(driver, submission, 5)


def test_places_of_siblings_are_kept_while_the_prompt_is_computed():
    driver = Driver(max_num_running=4, token_budget=8, lookahead=False)
    driver.submit(make_submission(1, 20, max_tokens=3, num_samples=3))
    for handle in (2, 3, 4):
        driver.submit(make_submission(handle, 1, max_tokens=9))
    driver.step()
    driver.step()
    driver.step()
    assert children(driver.sent[2]) == [2, 3]
    driver.run()
    assert_scheduler_empty(driver)


def test_as_many_fork_as_there_are_blocks_for():
    driver = Driver(facts=make_facts(num_blocks=3, block_size=4), lookahead=False)
    submission = make_submission(1, 6, max_tokens=3, num_samples=4)
    driver.submit(submission)
    driver.run()
    assert children(driver.sent[0]) == [2]
    assert not any(victims(plan) for plan in driver.sent)
    assert_outputs(driver, submission, 4)


def test_the_last_chunk_waits_for_the_answer_to_the_admission():
    """What the admission finds in the prefix index decides which chunk is the last one."""
    driver = Driver(token_budget=4)
    driver.submit(make_submission(1, 6, max_tokens=3, num_samples=2))
    assert entries(driver.send_plan()) == [(1, 4)]
    assert driver.send_plan() is None
    driver.run_engine()
    driver.receive()
    plan = driver.send_plan()
    assert (entries(plan), children(plan)) == ([(1, 2)], [2])
    driver.run()
    assert_scheduler_empty(driver)


def test_a_hit_that_completes_the_prompt_too_early_leaves_siblings_to_themselves():
    engine = FakeEngine(make_facts())
    driver = Driver(engine=engine, token_budget=4)
    submission = make_submission(1, 10, max_tokens=5, num_samples=3)
    driver.submit(submission)
    driver.send_plan()
    # Nothing was found when it was announced, and nearly all when it is admitted.
    found = iter([0, 9])
    engine.num_hit_tokens = lambda _: next(found, 0)
    assert entries(driver.send_plan()) == [(1, 4)]
    driver.run_engine()
    assert driver.receive().sampled_ids == [1]
    assert states(driver) == ["running", "waiting", "waiting"]
    driver.run()
    assert not any(children(plan) for plan in driver.sent)
    assert_outputs(driver, submission, 3)


def test_children_of_a_parent_that_was_refused_wait_for_its_next_try():
    engine = SharedPool(make_facts(num_blocks=8, block_size=4))
    driver = Driver(facts=engine.facts, engine=engine, lookahead=False)
    submission = make_submission(1, 6, max_tokens=3, num_samples=3)
    driver.submit(submission)
    plan = driver.send_plan()
    engine.num_foreign = 8
    driver.run_engine()
    assert driver.receive().unforked_ids == children(plan) == [2, 3]
    assert states(driver) == ["waiting", "sibling", "sibling"]
    engine.num_foreign = 0
    driver.results.append(engine.cancel([]))
    driver.receive()
    assert children(driver.send_plan()) == [2, 3]
    driver.run()
    assert_outputs(driver, submission, 3)


def test_a_parent_that_lost_its_blocks_forks_when_it_is_back():
    engine = SharedPool(make_facts(num_blocks=10, block_size=4))
    driver = Driver(facts=engine.facts, engine=engine, token_budget=6, lookahead=False)
    driver.submit(make_submission(1, 3, max_tokens=9))
    submission = make_submission(2, 12, max_tokens=3, num_samples=2)
    driver.submit(submission)
    driver.step()
    driver.step()
    # Only the blocks that the two hold are left, and the first one needs another.
    engine.num_foreign = engine.num_free
    driver.results.append(engine.cancel([]))
    driver.receive()
    while not driver.step().preempted_ids:
        assert len(driver.sent) < 10
    assert states(driver) == ["running", "preempted", "sibling"]
    assert_scheduler_consistent(driver.scheduler)
    engine.num_foreign = 0
    driver.run()
    (fork,) = [fork for plan in driver.sent for fork in plan.forks]
    assert (fork.parent_id, fork.generation, fork.child_ids) == (2, 1, [3])
    assert_outputs(driver, submission, 2)


def test_a_request_that_is_resumed_does_not_fork():
    driver = Driver()
    submission = make_submission(1, 6, max_tokens=5, num_samples=2)
    known = expected_output(submission, driver.facts)
    submission.resume_token_ids = [known[:1], known[:3]]
    driver.submit(submission)
    driver.run()
    assert not any(plan.forks for plan in driver.sent)
    assert_outputs(driver, submission, 2)


# Ends of all kinds.


def start_prompt(num_samples: int = 3) -> Driver:
    """A driver in which sample 0 computes a long prompt and the others wait for it."""
    driver = Driver(token_budget=4, lookahead=False)
    driver.submit(make_submission(1, 10, max_tokens=4, num_samples=num_samples))
    driver.step()
    assert states(driver) == ["running"] + ["sibling"] * (num_samples - 1)
    return driver


def test_siblings_of_a_cancelled_request_end_at_once():
    driver = start_prompt()
    driver.take(driver.scheduler.cancel(GATEWAY, 1))
    assert [driver.reason(1, i) for i in (1, 2)] == [FinishReason.CANCELLED] * 2
    driver.run()
    assert driver.reason(1, 0) is FinishReason.CANCELLED
    assert_scheduler_empty(driver)


def test_a_sibling_that_is_finished_early_is_not_forked():
    driver = start_prompt()
    driver.take(driver.scheduler.finish_sample(GATEWAY, 1, 1))
    assert driver.reason(1, 1) is FinishReason.STOP
    driver.run()
    assert [child_id for plan in driver.sent for child_id in children(plan)] == [3]
    assert [driver.reason(1, i) for i in (0, 2)] == [FinishReason.LENGTH] * 2
    assert_scheduler_empty(driver)


def test_siblings_go_their_own_way_when_sample_0_is_finished_before_the_fork():
    driver = start_prompt()
    driver.take(driver.scheduler.finish_sample(GATEWAY, 1, 0))
    assert states(driver) == ["cancelling", "waiting", "waiting"]
    assert_scheduler_consistent(driver.scheduler)
    driver.run()
    assert not any(plan.forks for plan in driver.sent)
    assert [driver.reason(1, i) for i in range(3)] == [
        FinishReason.STOP,
        FinishReason.LENGTH,
        FinishReason.LENGTH,
    ]
    assert_scheduler_empty(driver)


def test_a_cancel_waits_for_the_fork_to_be_heard():
    driver = Driver()
    driver.submit(make_submission(1, 6, max_tokens=50, num_samples=2))
    driver.send_plan()
    driver.take(driver.scheduler.finish_sample(GATEWAY, 1, 1))
    assert driver.scheduler.take_cancels() == []
    assert driver.send_plan() is None
    driver.run_engine()
    driver.receive()
    assert driver.output(1, 1) == []
    assert driver.scheduler.take_cancels() == [2]
    driver.results.append(driver.engine.cancel([2]))
    driver.receive()
    assert driver.reason(1, 1) is FinishReason.STOP
    assert states(driver) == ["running"]
    driver.run()
    assert_scheduler_empty(driver)


def test_a_cancelled_child_that_was_not_forked_ends_without_the_executor():
    engine = SharedPool(make_facts(num_blocks=8, block_size=4))
    driver = Driver(facts=engine.facts, engine=engine)
    driver.submit(make_submission(1, 6, max_tokens=4, num_samples=2))
    driver.send_plan()
    driver.take(driver.scheduler.finish_sample(GATEWAY, 1, 1))
    engine.num_foreign = 8
    driver.run_engine()
    assert driver.receive().unforked_ids == [2]
    assert driver.reason(1, 1) is FinishReason.STOP
    assert driver.scheduler.take_cancels() == []
    engine.num_foreign = 0
    driver.results.append(engine.cancel([]))
    driver.run()
    assert_scheduler_empty(driver)


def test_samples_of_one_token_end_in_the_step_that_forks_them():
    driver = Driver()
    submission = make_submission(1, 6, max_tokens=1, num_samples=3)
    driver.submit(submission)
    driver.run()
    assert len(driver.sent) == 1
    assert_outputs(driver, submission, 3)


def test_a_deadline_ends_siblings_too():
    driver = Driver(token_budget=4, lookahead=False)
    driver.submit(make_submission(1, 40, max_tokens=4, num_samples=3, deadline_ns=3_000_000))
    driver.run()
    assert [driver.reason(1, i) for i in range(3)] == [FinishReason.DEADLINE] * 3
    assert_scheduler_empty(driver)


@pytest.mark.parametrize("num_steps", range(4))
def test_a_lost_executor_is_a_stall_for_siblings_and_children(num_steps):
    driver = Driver(token_budget=4)
    submission = make_submission(1, 10, max_tokens=4, num_samples=3)
    driver.submit(submission)
    for _ in range(num_steps):
        driver.step()
    driver.send_plan()
    driver.lose_executor()
    assert_scheduler_consistent(driver.scheduler)
    driver.start_executor()
    driver.run()
    assert_outputs(driver, submission, 3)


def test_siblings_count_as_waiting():
    driver = Driver(lookahead=False, token_budget=4)
    driver.submit(make_submission(1, 10, num_samples=3))
    snapshot = driver.scheduler.snapshot()
    assert (snapshot.num_waiting, snapshot.num_queued_requests) == (3, 1)
    assert snapshot.num_queued_tokens == 30
    driver.step()
    snapshot = driver.scheduler.snapshot()
    assert (snapshot.num_waiting, snapshot.num_queued_requests) == (2, 1)
    assert snapshot.num_queued_tokens == 20
    driver.run()
    assert_scheduler_empty(driver)


def test_siblings_wait_for_the_prefix_that_sample_0_computes():
    driver = traced(token_budget=4, lookahead=False)
    submit(driver, 1, 10, 4, num_samples=2)
    driver.run()
    parent = driver.trace.named("sequence")[0]
    (stall,) = [
        span
        for span in driver.trace.named("stall")
        if span.attributes["pageframe.stall.cause"] == "prefix_wait"
    ]
    assert stall.links == ((parent.trace_id, parent.span_id),)
    assert driver.completion(1, 1).stall_ns == {StallCause.PREFIX_WAIT: 3_000_000}
    child_id = stall.attributes["pageframe.sequence_id"]
    decodes = [
        span
        for span in driver.trace.named("decode")
        if span.attributes["pageframe.sequence_id"] == child_id
    ]
    assert [span.tokens for span in decodes] == [(10, 13)]
    assert SequenceState.SIBLING.value == "sibling"
