"""Rates of tenants: what a minute holds, who is refused and until when, and what comes back."""

from dataclasses import replace

import pytest

from pageframe.core.errors import OutOfRangeError, ResourceExhaustedError
from pageframe.core.request import RateLevel, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.terms import TenantRate, TenantTerms
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.scheduler.rate_limits import Bucket
from unit.scheduler.driver import GATEWAY, Driver

MINUTE_NS = 60 * NANOSECONDS_PER_SECOND


def test_a_bucket_is_full_at_first_and_fills_at_its_rate() -> None:
    bucket = Bucket(6, 0)
    assert [bucket.wait_ns(6, 0), bucket.num_left(0)] == [0, 6]
    bucket.take(6, 0)
    # Six a minute is one in ten seconds.
    assert bucket.wait_ns(1, 0) == 10 * NANOSECONDS_PER_SECOND
    assert bucket.wait_ns(2, 15 * NANOSECONDS_PER_SECOND) == 5 * NANOSECONDS_PER_SECOND
    assert bucket.num_left(15 * NANOSECONDS_PER_SECOND) == 1
    assert bucket.num_left(3 * MINUTE_NS) == 6, "nothing is saved up beyond a minute's worth"


def test_the_time_that_a_bucket_tells_is_the_first_at_which_there_is_enough() -> None:
    bucket = Bucket(7, 0)
    bucket.take(7, 0)
    wait_ns = bucket.wait_ns(3, 0)
    assert bucket.wait_ns(3, wait_ns - 1) == 1
    assert bucket.num_left(wait_ns - 1) == 2
    assert bucket.wait_ns(3, wait_ns) == 0
    assert bucket.num_left(wait_ns) == 3


def test_what_is_given_back_can_be_taken_again_and_no_more_than_fits() -> None:
    bucket = Bucket(10, 0)
    bucket.take(8, 0)
    bucket.give_back(3)
    assert bucket.num_left(0) == 5
    bucket.give_back(100)
    assert bucket.num_left(0) == 10


def test_a_rate_that_changes_keeps_what_was_taken() -> None:
    bucket = Bucket(10, 0)
    bucket.take(8, 0)
    bucket.change(100, 0)
    assert bucket.num_left(0) == 92
    bucket.change(5, 0)
    assert bucket.num_left(0) == 0
    assert bucket.wait_ns(1, 0) == 4 * MINUTE_NS // 5


def request(handle: int, *, max_tokens: int = 4, tenant: str = "a", **more: object) -> Submission:
    """Eight tokens of prompt."""
    sampling = SamplingParams(max_tokens=max_tokens, seed=1)
    submission = Submission(
        handle=handle,
        request_id=f"request-{handle}",
        prompt_token_ids=[handle % 7 + 1] * 8,
        sampling=sampling,
        tenant=tenant,
    )
    return replace(submission, **more)


def limited(**rate: int) -> Driver:
    driver = Driver()
    terms = TenantTerms(rates=(TenantRate(tenant="a", **rate),))
    driver.scheduler.set_terms(terms, driver.clock.now_ns())
    return driver


def refusal(driver: Driver, submission: Submission) -> ResourceExhaustedError:
    with pytest.raises(ResourceExhaustedError) as caught:
        driver.submit(submission)
    assert caught.value.reason == "RATE_LIMITED"
    return caught.value


def test_requests_of_a_tenant_are_counted_over_all_gateways_and_nobody_elses_are() -> None:
    driver = limited(num_requests_per_minute=2)
    driver.submit(request(1), gateway_id=1)
    driver.submit(request(2), gateway_id=2)
    error = refusal(driver, request(3))
    assert error.limits == {
        "retry_after_s": "30.000",
        "num_requests_per_minute": "2",
        "num_requests_left": "0",
        "requests_full_after_s": "60.000",
    }
    assert "tenant 'a' has used up its 2 requests in a minute" in error.message
    driver.submit(request(4, tenant="b"))
    driver.clock.advance_ns(30 * NANOSECONDS_PER_SECOND)
    driver.submit(request(3))
    refusal(driver, request(5))


def test_a_request_that_is_let_in_is_told_what_is_left_and_others_are_told_nothing() -> None:
    driver = limited(num_requests_per_minute=6, num_tokens_per_minute=60)
    told = {}
    for handle, tenant in ((1, "a"), (2, "b"), (3, "a")):
        driver.scheduler.submit(request(handle, tenant=tenant, max_tokens=2), GATEWAY)
        told |= {
            handle: levels
            for _, events in driver.scheduler.cancel(GATEWAY, handle)
            for handle, levels in events.rates.items()
        }
    assert told == {
        1: {
            "requests": RateLevel(6, 5, 10 * NANOSECONDS_PER_SECOND),
            "tokens": RateLevel(60, 50, 10 * NANOSECONDS_PER_SECOND),
        },
        # The first gave back the two tokens of output that it did not use.
        3: {
            "requests": RateLevel(6, 4, 20 * NANOSECONDS_PER_SECOND),
            "tokens": RateLevel(60, 42, 18 * NANOSECONDS_PER_SECOND),
        },
    }


def test_a_refused_request_costs_nothing() -> None:
    driver = limited(num_requests_per_minute=2)
    driver.submit(request(1))
    driver.submit(request(2))
    for handle in range(3, 9):
        refusal(driver, request(handle))
    driver.clock.advance_ns(30 * NANOSECONDS_PER_SECOND)
    driver.submit(request(9))


def test_a_request_that_is_refused_for_another_reason_is_not_counted() -> None:
    driver = Driver(max_queued_requests=1)
    terms = TenantTerms(rates=(TenantRate(tenant="a", num_requests_per_minute=2),))
    driver.scheduler.set_terms(terms, driver.clock.now_ns())
    driver.submit(request(1))
    with pytest.raises(ResourceExhaustedError) as caught:
        driver.submit(request(2))
    assert caught.value.reason == "QUEUE_FULL"
    driver.run()
    driver.submit(request(3))


def test_tokens_are_taken_for_the_longest_output_and_what_is_not_used_comes_back() -> None:
    driver = limited(num_tokens_per_minute=40)
    driver.submit(request(1, max_tokens=20))
    # 40 - 8 - 20 leaves 12, and this one may use 13.
    error = refusal(driver, request(2, max_tokens=5))
    assert error.limits["num_tokens_left"] == "12"
    assert error.limits["retry_after_s"] == "1.500"
    driver.take(driver.scheduler.cancel(GATEWAY, 1))
    driver.run()
    driver.submit(request(2, max_tokens=5))


def test_every_sample_is_taken_for_and_the_prompt_once() -> None:
    driver = limited(num_tokens_per_minute=100)
    driver.submit(request(1, max_tokens=10, num_samples=3))
    assert refusal(driver, request(2, max_tokens=60)).limits["num_tokens_left"] == "62"


def test_a_request_that_no_minute_could_hold_is_not_worth_another_try() -> None:
    driver = limited(num_tokens_per_minute=27)
    with pytest.raises(OutOfRangeError) as caught:
        driver.submit(request(1, max_tokens=20))
    assert caught.value.reason == "EXCEEDS_RATE"
    assert caught.value.limits == {"num_tokens": "28", "num_tokens_per_minute": "27"}
    driver.submit(request(1, max_tokens=19))


def test_a_request_that_a_gateway_sends_again_is_let_in_and_pays_for_nothing_twice() -> None:
    driver = limited(num_requests_per_minute=1, num_tokens_per_minute=100)
    driver.submit(request(1, max_tokens=20), gateway_id=1)
    refusal(driver, request(2))
    # Its stream breaks: the scheduler takes the request back, the gateway sends it again.
    while len(output := driver.tokens[1, 1, 0]) < 3:
        driver.step()
    driver.take(driver.scheduler.cancel_gateway(1))
    again = request(1, max_tokens=20, resume_token_ids=[list(output)], is_resubmitted=True)
    again.request_id = "again"
    driver.submit(again, gateway_id=2)
    driver.run()
    # 8 and 20 are used, whatever became of the stream; no more, and no less.
    limits = refusal(driver, request(3)).limits
    assert limits["num_tokens_left"] == "72"
    assert float(limits["requests_full_after_s"]) <= 60, "one request was counted"


def test_terms_that_change_while_it_runs_hold_at_once() -> None:
    driver = limited(num_requests_per_minute=1)
    driver.submit(request(1))
    refusal(driver, request(2))
    driver.scheduler.set_terms(TenantTerms(), driver.clock.now_ns())
    driver.submit(request(2))
    driver.submit(request(3))
