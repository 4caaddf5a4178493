"""Beam searches: planned, taken further, started over, ended."""

import pytest

from pageframe.core.beams import EarlyStopping
from pageframe.core.errors import InvalidRequestError, OutOfRangeError
from pageframe.core.request import Delivery
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.lab.simulation.leaks import reachable
from pageframe.scheduler.request import Request
from pageframe.scheduler.sequence import Sequence
from unit.scheduler.beam_house import alone, assert_engine_empty, found, make_driver, search
from unit.scheduler.driver import make_submission
from unit.scheduler.test_tracing import Spans


def test_a_search_ends_with_its_outputs_best_first():
    driver = make_driver()
    request = search(1, num_beams=4, num_return=3)
    driver.submit(request)
    driver.run()
    outputs = found(driver, request)
    assert [len(token_ids) for token_ids, _ in outputs] == [8, 8, 8]
    assert len({tuple(token_ids) for token_ids, _ in outputs}) == 3
    scores = [score for _, score in outputs]
    assert scores == sorted(scores, reverse=True)
    assert [driver.reason(1, index) for index in range(3)] == [FinishReason.LENGTH] * 3
    assert_engine_empty(driver)


def test_at_rest_nothing_of_a_search_is_kept():
    driver = make_driver()
    driver.submit(search(1, num_beams=2))
    driver.run()
    driver.submit(search(2, num_beams=2))
    driver.step()
    driver.take(driver.scheduler.cancel(1, 2))
    driver.run()
    assert reachable([driver.scheduler], (Request, Sequence)) == []


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("has_prefix_cache", [True, False])
@pytest.mark.parametrize("eos_probability", [0.0, 1.0])
@pytest.mark.parametrize("early_stopping", list(EarlyStopping))
def test_it_finds_the_same_however_memory_is_cut(
    block_size, has_prefix_cache, eos_probability, early_stopping
):
    request = search(1, num_beams=4, num_return=4, max_tokens=12, early_stopping=early_stopping)
    expected = alone(request, block_size=1, eos_probability=eos_probability)
    driver = make_driver(
        block_size=block_size, has_prefix_cache=has_prefix_cache, eos_probability=eos_probability
    )
    driver.submit(request)
    driver.run()
    assert found(driver, request) == expected
    assert_engine_empty(driver)


def test_plans_say_how_beams_go_on_and_who_ends():
    driver = make_driver()
    driver.submit(search(1, 6, num_beams=3))
    driver.step()
    root_id = driver.sent[0].announce[0].sequence_id
    assert driver.sent[0].announce[0].sampling.num_candidates == 4
    driver.step()
    plan = driver.sent[1]
    assert plan.branches.parent_ids == [root_id] * 3
    assert len(set(plan.branches.child_ids)) == 3
    assert root_id not in plan.branches.child_ids
    assert (len(plan.must), plan.finish) == (0, [])
    known = set(plan.branches.child_ids)
    while driver.step() is not None:
        branches = driver.sent[-1].branches
        assert set(branches.parent_ids) <= known
        # Each parent goes on in its place, and everybody else ends.
        assert set(branches.parent_ids) <= set(branches.child_ids)
        if branches:
            assert known.difference(branches.parent_ids) == set(driver.sent[-1].finish)
            known = set(branches.child_ids)
    driver.run()
    assert_engine_empty(driver)


def test_while_beams_run_each_plan_waits_for_a_result():
    driver = make_driver()
    driver.submit(make_submission(1, 6, max_tokens=20))
    driver.submit(search(2))
    while driver.plans or driver.send_plan() is not None:
        if driver.sent[-1].branches:
            assert driver.send_plan() is None
        driver.run_engine()
        driver.receive()


def test_others_run_beside_it_and_nobody_gets_another_output():
    requests = [search(1, 9, num_beams=4), search(2, 5, num_beams=2, num_return=2)]
    expected = [alone(request) for request in requests]
    driver = make_driver()
    samples = make_submission(3, 7, max_tokens=15, num_samples=3)
    for request in (*requests, samples):
        driver.submit(request)
    driver.run()
    assert [found(driver, request) for request in requests] == expected
    solo = make_driver()
    solo.submit(samples)
    solo.run()
    assert [driver.output(3, k) for k in range(3)] == [solo.output(3, k) for k in range(3)]


def test_it_gives_way_as_a_whole_and_starts_over():
    request = search(2, 6, num_beams=4, max_tokens=14)
    expected = alone(request)
    # The first grows from 6 to 12 blocks of 4; the search takes up to 1 + 4 * 4.
    driver = make_driver(num_blocks=17)
    driver.submit(make_submission(1, 24, max_tokens=24))
    driver.submit(request)
    driver.run()
    assert driver.completion(2).account.num_preemptions > 0
    assert driver.completion(1).account.num_preemptions == 0
    assert found(driver, request) == expected
    assert_engine_empty(driver)


def test_two_searches_that_do_not_fit_together_both_come_to_their_end():
    requests = [search(handle, 6, num_beams=4, max_tokens=14) for handle in (1, 2, 3)]
    expected = [alone(request) for request in requests]
    driver = make_driver(num_blocks=20)
    for request in requests:
        driver.submit(request)
    driver.run()
    assert [found(driver, request) for request in requests] == expected
    assert sum(driver.completion(h).account.num_preemptions for h in (1, 2, 3)) > 0
    assert_engine_empty(driver)


@pytest.mark.parametrize("num_steps", range(9))
def test_a_cancel_ends_all_beams_at_any_time(num_steps):
    driver = make_driver()
    driver.submit(search(1, 6, num_beams=3, num_return=2, max_tokens=30))
    driver.submit(make_submission(2, 6, max_tokens=30))
    for _ in range(num_steps):
        driver.step()
    driver.send_plan()
    driver.take(driver.scheduler.cancel(1, 1))
    driver.run()
    assert [driver.reason(1, index) for index in (0, 1)] == [FinishReason.CANCELLED] * 2
    assert driver.reason(2) == FinishReason.LENGTH
    assert_engine_empty(driver)


@pytest.mark.parametrize("num_steps", range(7))
def test_it_starts_over_when_the_executor_is_lost(num_steps):
    request = search(1, 6, num_beams=3, num_return=3)
    expected = alone(request)
    driver = make_driver()
    driver.submit(request)
    for _ in range(num_steps):
        driver.step()
    driver.send_plan()
    driver.lose_executor()
    fresh = make_driver().engine
    driver.engine = fresh
    now_ns = driver.clock.now_ns()
    driver.take(driver.scheduler.on_executor_ready(fresh.facts, fresh.account(), now_ns))
    driver.run()
    assert found(driver, request) == expected
    assert_engine_empty(driver)


def test_a_refused_plan_is_made_again():
    request = search(1, 6, num_beams=3)
    driver = make_driver()
    driver.submit(request)
    for number in range(6):
        driver.send_plan()
        driver.run_engine(refuse=number % 2 == 1)
        driver.receive()
    driver.run()
    assert found(driver, request) == alone(request)


def test_one_token_is_the_best_candidate():
    driver = make_driver()
    request = search(1, num_beams=4, num_return=4, max_tokens=1)
    driver.submit(request)
    driver.run()
    outputs = found(driver, request)
    candidates = driver.engine.results[0].candidates
    (best,) = candidates.values()
    assert [token_ids for token_ids, _ in outputs] == [[token] for token in best.token_ids[:4]]
    assert_engine_empty(driver)


def test_as_many_beams_as_there_are_places_run_and_one_more_is_refused():
    driver = make_driver(max_num_running=5, num_rows=5)
    driver.submit(search(1, num_beams=5))
    with pytest.raises(OutOfRangeError) as caught:
        driver.submit(search(2, num_beams=6))
    assert caught.value.reason == "TOO_MANY_BEAMS"
    # Others wait until a place is free, and it waits until all five are.
    driver.submit(make_submission(3, max_tokens=9))
    driver.submit(search(4, num_beams=5))
    driver.run()
    assert len(driver.output(1)) == len(driver.output(4)) == 8
    assert driver.reason(3) == FinishReason.LENGTH
    beams = [len(result.candidates) for result in driver.engine.results]
    assert max(beams) == 5
    for result in driver.engine.results:
        assert len(result.candidates) < 5 or not result.sampled_ids
    assert_engine_empty(driver)


def test_one_that_could_never_fit_is_refused_with_the_numbers():
    driver = make_driver(num_blocks=12)
    # 6 + 8 - 1 tokens: one block of 4 is shared, and each of the beams comes to hold 3 more.
    driver.submit(search(1, 6, num_beams=3, max_tokens=8))
    with pytest.raises(OutOfRangeError) as caught:
        driver.submit(search(2, 6, num_beams=4, max_tokens=8))
    assert caught.value.reason == "EXCEEDS_POOL"
    assert caught.value.limits["num_blocks_needed"] == "13"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_beams": 0}, "NUM_BEAMS_OUT_OF_RANGE"),
        ({"num_beams": 65}, "NUM_BEAMS_OUT_OF_RANGE"),
        ({"num_return": 4}, "NUM_RETURN_OUT_OF_RANGE"),
        ({"length_penalty": 11.0}, "LENGTH_PENALTY_OUT_OF_RANGE"),
        ({"delivery": Delivery.EVERY_TOKEN}, "BEAMS_MISMATCH"),
        ({"resume_token_ids": [[1]]}, "RESUME_WITH_BEAMS"),
        ({"sampling": SamplingParams(temperature=0.5)}, "BEAMS_WITH_SAMPLING"),
        ({"sampling": SamplingParams(stop_token_ids=tuple(range(88)))}, "NUM_BEAMS_OUT_OF_RANGE"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, reason):
    driver = make_driver()
    with pytest.raises(InvalidRequestError) as caught:
        driver.submit(search(1, **fields))
    assert caught.value.reason == reason


def test_a_step_that_fails_ends_the_search_and_not_the_scheduler():
    driver = make_driver()
    driver.submit(search(1, num_return=2))
    for _ in range(4):
        driver.step()

    def fail(batch):
        raise RuntimeError("the device is on fire")

    runner = driver.engine.engine._runner
    execute, runner.execute = runner.execute, fail
    driver.step()
    runner.execute = execute
    driver.submit(search(2))
    driver.run()
    assert [driver.reason(1, index) for index in (0, 1)] == [FinishReason.ERROR] * 2
    assert driver.reason(2) == FinishReason.LENGTH
    assert_engine_empty(driver)


def test_the_account_says_what_was_shared_copied_and_not_returned():
    driver = make_driver()
    request = search(1, 6, num_beams=3, max_tokens=2)
    driver.submit(request)
    driver.run()
    completion = driver.completion(1)
    # Three beams share the 2 blocks of the prompt and copy its last: all but one.
    assert completion.account.num_copies_on_write == 2
    assert completion.account.num_blocks_shared == 4
    assert completion.account.num_blocks_peak == 2
    # Three beams computed a token each, and one output of two tokens has one that was computed.
    assert completion.num_unreturned_tokens == 2


def time_of(driver, handle):
    """Elapsed time, and the sum of what it is attributed to."""
    completion = driver.completion(handle)
    elapsed_ns = completion.end_ns - completion.submit_ns
    return elapsed_ns, completion.compute_ns + sum(completion.stall_ns.values())


def test_all_time_is_attributed_and_what_is_computed_again_is_a_stall():
    driver = make_driver(num_blocks=17)
    driver.submit(make_submission(1, 24, max_tokens=24))
    driver.submit(search(2, 6, num_beams=4, max_tokens=14))
    driver.run()
    for handle in (1, 2):
        elapsed_ns, attributed_ns = time_of(driver, handle)
        assert attributed_ns == elapsed_ns
    completion = driver.completion(2)
    assert completion.account.num_preemptions > 0
    # One step for the prompt and one for each token but the last, as if it had never given way.
    assert completion.compute_ns == 14 * 1e6


def test_its_root_says_how_far_it_is_and_spans_cover_what_beams_compute():
    sink = Spans()
    driver = make_driver(trace=sink)
    trace = {"trace_id": b"t" * 16, "span_id": b"s" * 8}
    driver.submit(search(1, 6, num_beams=2, max_tokens=9, **trace))
    for _ in range(4):
        driver.step()
    (sequence,) = driver.scheduler.snapshot().sequences
    assert (sequence.num_computed_tokens, sequence.num_output_tokens) == (9, 0)
    driver.run()
    assert [span.tokens for span in sink.named("prefill")] == [(0, 6)]
    assert [span.tokens for span in sink.named("decode")] == [(6, 14)]


def test_the_prompts_log_probabilities_are_told_once():
    driver = make_driver(num_blocks=17)
    driver.submit(make_submission(1, 24, max_tokens=24))
    sampling = SamplingParams(max_tokens=14, num_prompt_logprobs=1)
    driver.submit(search(2, 6, num_beams=4, sampling=sampling))
    driver.run()
    assert driver.completion(2).account.num_preemptions > 0
    told = [message.prompt_logprobs[2] for message in driver.messages if message.prompt_logprobs]
    assert [len(entries) for entries in told] == [5]


def test_a_deadline_ends_a_search_with_all_its_outputs():
    driver = make_driver()
    deadline_ns = driver.clock.now_ns() + 6_500_000
    driver.submit(search(1, num_return=2, max_tokens=40, deadline_ns=deadline_ns))
    driver.run()
    for index in (0, 1):
        completion = driver.completion(1, index)
        assert completion.finish_reason is FinishReason.DEADLINE
        assert completion.error_reason == "DEADLINE_PASSED"
        assert (completion.score, completion.num_output_tokens) == (None, 0)
    assert_engine_empty(driver)


def test_the_oldest_search_gives_way_when_even_alone_it_is_refused_and_comes_back():
    request = search(1, 6, num_beams=3)
    driver = make_driver()
    driver.submit(request)
    for _ in range(3):
        driver.step()
    for _ in range(3):
        driver.send_plan()
        driver.run_engine(refuse=True)
        driver.receive()
    # From the second refusal on all beams are named: somebody unknown may hold the blocks.
    driver.send_plan()
    beams = driver.sent[-1].branches.parent_ids
    assert set(beams) <= set(driver.sent[-1].victims.sequence_ids)
    driver.run()
    assert found(driver, request) == alone(request)
