"""Requests that must be over by some time, and those that cannot be."""

import pytest

from pageframe.core.errors import DeadlineError
from pageframe.core.request import Delivery, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.scheduler.deadlines import Deadlines, Least, least_tokens_due
from pageframe.scheduler.request import Request
from pageframe.testing.fake_engine import make_facts
from unit.scheduler.driver import Driver, assert_scheduler_empty, make_submission
from unit.scheduler.test_queues import make_request as request_of
from unit.scheduler.test_sequence import make_sequence

MS = 1_000_000


class Guess:
    """Prospects that say what they are told."""

    def __init__(self, time_ns: int = 0) -> None:
        self.time_ns = time_ns

    def least(self, submission, sequence=None) -> Least:
        return Least(num_tokens=3, num_steps=2, time_ns=self.time_ns)


def make_request(serial: int, deadline_ns: int = 0) -> Request:
    request = request_of(serial, deadline_ns)
    request.sequences.append(make_sequence(sequence_id=serial))
    return request


def test_deadlines_come_in_order_and_requests_without_one_never():
    deadlines = Deadlines(Guess())
    late, early, none = make_request(1, 300), make_request(2, 100), make_request(3)
    for request in (late, early, none):
        deadlines.add(request, 0)
    assert deadlines.next_ns == 100
    assert deadlines.pop_expired(99) == []
    assert deadlines.pop_expired(300) == [(early, None), (late, None)]
    assert deadlines.next_ns == 0


def test_requests_that_are_over_are_dropped_from_the_heap():
    deadlines = Deadlines(Guess())
    requests = [make_request(serial, 1000 + serial) for serial in range(100)]
    for request in requests:
        deadlines.add(request, 0)
    for request in requests[:90]:
        request.num_living = 0
        deadlines.forget(request)
    assert len(deadlines) == 10
    assert len(deadlines._heap) <= 20
    assert deadlines.next_ns == 1090
    assert deadlines.pop_expired(5000) == [(request, None) for request in requests[90:]]


def test_who_still_waits_is_given_up_when_its_latest_start_has_passed():
    deadlines = Deadlines(Guess(40))
    request = make_request(1, 100)
    deadlines.add(request, 0)
    assert deadlines.next_ns == 60
    assert deadlines.pop_expired(60) == []
    assert deadlines.next_ns == 61
    ((given_up, error),) = deadlines.pop_expired(61)
    assert (given_up, error.reason) == (request, "DEADLINE_UNREACHABLE")
    assert error.limits == {
        "deadline_ns": "100",
        "now_ns": "61",
        "left_ns": "39",
        "least_ns": "40",
        "num_tokens": "3",
        "num_steps": "2",
    }
    deadlines.forget(request)
    assert (len(deadlines), deadlines.next_ns) == (0, 0)


def test_who_takes_less_than_it_seemed_is_looked_at_again_later():
    guess = Guess(40)
    deadlines = Deadlines(guess)
    request = make_request(1, 100)
    deadlines.add(request, 0)
    guess.time_ns = 10
    assert deadlines.pop_expired(70) == []
    assert deadlines.next_ns == 90
    assert len(deadlines) == 1


def test_who_has_begun_has_until_its_deadline():
    deadlines = Deadlines(Guess(40))
    request = make_request(1, 100)
    deadlines.add(request, 0)
    request.sequences[0].has_run = True
    assert deadlines.pop_expired(99) == []
    assert deadlines.next_ns == 100
    assert deadlines.pop_expired(100) == [(request, None)]


def test_an_output_may_end_as_early_as_something_ends_it():
    def due(**sampling) -> int:
        delivery = sampling.pop("delivery", Delivery.EVERY_TOKEN)
        params = SamplingParams(max_tokens=50, **sampling)
        return least_tokens_due(make_submission(1, sampling=params, delivery=delivery))

    assert due() == 1
    assert due(min_tokens=7) == 7
    assert due(ignore_eos=True) == 50
    assert due(ignore_eos=True, stop_token_ids=(5,)) == 1
    # A stop string may come, which only the gateway knows.
    assert due(ignore_eos=True, delivery=Delivery.COALESCED) == 1


def endless(handle: int, num_prompt_tokens: int, max_tokens: int, **fields) -> Submission:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return make_submission(handle, num_prompt_tokens, sampling=sampling, **fields)


def warm_driver(**fields) -> Driver:
    """A driver that has seen steps; each lasts a millisecond whatever is in it."""
    driver = Driver(facts=make_facts(num_blocks=200), shares_prefixes=False, **fields)
    driver.submit(make_submission(1000, 4, max_tokens=20))
    driver.run()
    return driver


def test_what_cannot_be_over_in_time_is_refused_at_once_with_the_numbers():
    driver = warm_driver()
    now_ns = driver.clock.now_ns()
    # Two steps for 32 prompt tokens at a budget of 16, then 29 more: 31 ms.
    with pytest.raises(DeadlineError) as refused:
        driver.submit(endless(1, 32, 30, deadline_ns=now_ns + 30 * MS))
    assert refused.value.reason == "DEADLINE_UNREACHABLE"
    limits = refused.value.limits
    assert (limits["num_tokens"], limits["num_steps"]) == ("32", "31")
    assert (limits["left_ns"], limits["least_ns"]) == (str(30 * MS), str(31 * MS))
    driver.submit(endless(2, 32, 30, deadline_ns=now_ns + 40 * MS))
    driver.run()
    assert driver.reason(2) is FinishReason.LENGTH
    assert_scheduler_empty(driver)


def test_a_bound_that_is_just_kept_is_kept():
    driver = warm_driver(lookahead=False)
    now_ns = driver.clock.now_ns()
    driver.submit(endless(1, 32, 30, deadline_ns=now_ns + 31 * MS))
    # The last token comes with the last moment; being late is something else.
    for _ in range(31):
        driver.take(driver.scheduler.expire(driver.clock.now_ns() - 1))
        driver.step()
    assert driver.reason(1) is FinishReason.LENGTH


def test_nobody_is_refused_for_what_an_end_of_sequence_may_spare():
    driver = warm_driver()
    now_ns = driver.clock.now_ns()
    driver.submit(make_submission(1, 16, max_tokens=200, deadline_ns=now_ns + 5 * MS))
    driver.run()
    assert driver.reason(1) is FinishReason.DEADLINE
    assert driver.completion(1).error_reason == "DEADLINE_PASSED"
    assert len(driver.output(1)) >= 2


def test_nobody_is_refused_before_a_step_was_seen_or_by_another_executor():
    driver = Driver(shares_prefixes=False)
    driver.submit(endless(1, 16, 30, deadline_ns=driver.clock.now_ns() + 1))
    driver.run()
    # The first steps of a process may be slow.
    driver.submit(make_submission(2, 4, max_tokens=10))
    driver.run()
    driver.submit(endless(3, 16, 30, deadline_ns=driver.clock.now_ns() + MS))
    driver = warm_driver()
    driver.lose_executor()
    driver.start_executor()
    driver.submit(endless(1, 16, 30, deadline_ns=driver.clock.now_ns() + 1))


def test_a_prompt_that_may_be_in_memory_is_not_counted():
    driver = Driver(facts=make_facts(num_blocks=200))
    driver.submit(make_submission(1000, 4, max_tokens=20))
    driver.run()
    driver.submit(endless(1, 160, 1, deadline_ns=driver.clock.now_ns() + 2 * MS))
    assert driver.scheduler.snapshot().num_requests == 1


def test_who_waits_behind_others_for_too_long_ends_early_and_never_runs():
    driver = warm_driver(max_num_running=1)
    driver.submit(endless(1, 4, 50))
    deadline_ns = driver.clock.now_ns() + 40 * MS
    driver.submit(endless(2, 4, 30, deadline_ns=deadline_ns))
    driver.submit(endless(3, 4, 30))
    driver.run()
    completion = driver.completion(2)
    assert completion.finish_reason is FinishReason.DEADLINE
    assert completion.error_reason == "DEADLINE_UNREACHABLE"
    assert completion.error_status == "DEADLINE_EXCEEDED"
    assert 9 * MS <= int(completion.error_limits["now_ns"]) - (deadline_ns - 40 * MS) <= 12 * MS
    assert driver.output(2) == []
    assert all(2 not in plan.may.sequence_ids for plan in driver.sent if plan.step > 30)
    assert driver.reason(3) is FinishReason.LENGTH
    assert_scheduler_empty(driver)
