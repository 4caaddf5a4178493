import pytest

from pageframe.core.errors import (
    AlreadyExistsError,
    DeadlineError,
    InvalidRequestError,
    OutOfRangeError,
    ResourceExhaustedError,
    UnavailableError,
)
from pageframe.core.request import Delivery
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.testing.fake_engine import make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)

FACTS = make_facts(num_blocks=8, block_size=4, max_model_len=100, vocab_size=1000)


def refuse(submission, error_type, reason, **limits):
    driver = Driver(facts=FACTS, max_num_running=4)
    with pytest.raises(error_type) as refused:
        driver.submit(submission)
    assert refused.value.reason == reason
    given = refused.value.limits
    assert {key: given[key] for key in limits} == {k: str(v) for k, v in limits.items()}
    assert_scheduler_empty(driver)
    driver.submit(make_submission(99))
    driver.run()
    assert driver.reason(99) is FinishReason.LENGTH


def test_an_empty_prompt_is_refused():
    refuse(make_submission(1, []), InvalidRequestError, "PROMPT_EMPTY", num_prompt_tokens=0)


def test_more_tokens_than_the_context_are_refused_with_the_numbers():
    refuse(
        make_submission(1, 90, max_tokens=11),
        OutOfRangeError,
        "CONTEXT_TOO_LONG",
        num_prompt_tokens=90,
        max_tokens=11,
        max_model_len=100,
    )


def test_more_blocks_than_the_pool_are_refused_with_the_numbers():
    refuse(
        make_submission(1, 30, max_tokens=4),
        OutOfRangeError,
        "EXCEEDS_POOL",
        num_blocks_needed=9,
        num_blocks=8,
        block_size_tokens=4,
    )


def test_a_request_that_fills_the_pool_to_the_last_slot_is_served():
    driver = Driver(facts=FACTS)
    # The last token is sampled and never computed: 30 + 3 tokens need 32 slots.
    driver.submit(make_submission(1, 30, max_tokens=3))
    driver.run()
    assert len(driver.output(1)) == 3


@pytest.mark.parametrize("token_id", [-1, 1000])
def test_a_token_id_out_of_the_vocabulary_is_refused(token_id):
    refuse(
        make_submission(1, [5, token_id, 6]),
        InvalidRequestError,
        "TOKEN_ID_OUT_OF_RANGE",
        field="prompt_token_ids",
        token_id=token_id,
        vocab_size=1000,
    )


@pytest.mark.parametrize("num_samples", [0, -1, 65])
def test_a_number_of_samples_out_of_range_is_refused(num_samples):
    refuse(
        make_submission(1, num_samples=num_samples),
        InvalidRequestError,
        "NUM_SAMPLES_OUT_OF_RANGE",
        num_samples_max=64,
    )


def test_more_samples_than_may_run_are_served_one_after_the_other():
    driver = Driver(facts=FACTS, max_num_running=2)
    submission = make_submission(1, num_samples=5)
    driver.submit(submission)
    driver.run()
    expected = expected_output(submission, FACTS)
    assert [driver.output(1, index) for index in range(5)] == [expected] * 5
    assert_scheduler_empty(driver)


@pytest.mark.parametrize("field_name", ["session_id", "prefix_handle"])
def test_a_name_that_is_too_long_is_refused_with_the_numbers(field_name):
    refuse(
        make_submission(1, **{field_name: "é" * 129}),
        InvalidRequestError,
        f"{field_name.upper()}_TOO_LONG",
        num_bytes=258,
        num_bytes_max=256,
    )


def test_sampling_parameters_are_checked_here_too():
    refuse(
        make_submission(1, sampling=SamplingParams(temperature=float("nan"))),
        InvalidRequestError,
        "SAMPLING_PARAMETER_OUT_OF_RANGE",
        field="temperature",
    )


def test_a_deadline_that_has_passed_is_refused():
    refuse(
        make_submission(1, deadline_ns=999_999),
        DeadlineError,
        "DEADLINE_PASSED",
        deadline_ns=999_999,
        now_ns=1_000_000,
    )


@pytest.mark.parametrize(
    ("resume", "reason"),
    [
        ([[1], [2]], "RESUME_MISMATCH"),
        ([[1, 2, 3, 4]], "RESUME_TOO_LONG"),
        ([[1000]], "TOKEN_ID_OUT_OF_RANGE"),
    ],
)
def test_known_output_must_fit_the_request(resume, reason):
    refuse(make_submission(1, resume_token_ids=resume), InvalidRequestError, reason)


def test_a_living_request_id_is_not_given_twice_but_a_dead_one_is():
    driver = Driver(facts=FACTS)
    driver.submit(make_submission(1, request_id="same"))
    with pytest.raises(AlreadyExistsError, match="DUPLICATE_REQUEST"):
        driver.submit(make_submission(2, request_id="same"), gateway_id=2)
    driver.run()
    driver.submit(make_submission(2, request_id="same"))
    driver.run()
    assert_scheduler_empty(driver)


def test_the_name_of_a_cancelled_request_is_free_before_it_is_released():
    driver = Driver(facts=FACTS)
    driver.submit(make_submission(1, request_id="same"))
    driver.step()
    driver.take(driver.scheduler.cancel(1, 1))
    driver.submit(make_submission(2, request_id="same"))
    driver.run()
    with_same_name = [driver.reason(1), driver.reason(2)]
    assert with_same_name == [FinishReason.CANCELLED, FinishReason.LENGTH]
    assert_scheduler_empty(driver)


def test_a_handle_names_one_living_request_of_a_gateway():
    driver = Driver(facts=FACTS)
    driver.submit(make_submission(1, request_id="a"))
    with pytest.raises(AlreadyExistsError, match="DUPLICATE_HANDLE"):
        driver.submit(make_submission(1, request_id="b"))
    driver.submit(make_submission(1, request_id="b"), gateway_id=2)
    driver.run()
    assert driver.output(1, gateway_id=2) == driver.output(1, gateway_id=1)


def test_the_queue_is_bounded_in_requests_and_in_tokens():
    driver = Driver(facts=FACTS, max_queued_requests=2, max_queued_tokens=20)
    driver.submit(make_submission(1, 10))
    with pytest.raises(ResourceExhaustedError, match="at most 20 may wait"):
        driver.submit(make_submission(2, 11))
    driver.submit(make_submission(3, 1))
    with pytest.raises(ResourceExhaustedError, match="at most 2 may"):
        driver.submit(make_submission(4, 1))
    driver.run()
    driver.submit(make_submission(4, 11))
    driver.run()
    assert_scheduler_empty(driver)


def test_nothing_new_comes_in_while_draining_and_the_rest_is_served():
    driver = Driver(facts=FACTS)
    driver.submit(make_submission(1))
    driver.scheduler.drain()
    with pytest.raises(UnavailableError, match="DRAINING"):
        driver.submit(make_submission(2))
    driver.run()
    assert driver.reason(1) is FinishReason.LENGTH
    assert driver.scheduler.snapshot().is_draining


def test_a_resumed_request_goes_on_where_its_output_ends():
    submission = make_submission(1, max_tokens=8)
    known = expected_output(submission, FACTS)
    submission.resume_token_ids = [known[:5]]
    driver = Driver(facts=FACTS)
    driver.submit(submission)
    driver.run()
    assert driver.output(1) == known
    assert sum(len(message.token_ids) for message in driver.messages) == 3
    (announcement,) = driver.sent[0].announce
    assert list(announcement.token_ids) == submission.prompt_token_ids + known[:5]
    assert announcement.num_prompt_tokens == 4


@pytest.mark.parametrize(
    ("sampling", "known", "reason"),
    [
        (SamplingParams(max_tokens=2), [7, 8], FinishReason.LENGTH),
        (SamplingParams(max_tokens=9, stop_token_ids=(8,)), [7, 8], FinishReason.STOP),
        (SamplingParams(max_tokens=9), [7, 0], FinishReason.STOP),
    ],
)
def test_a_resumed_sample_that_had_ended_completes_without_a_step(sampling, known, reason):
    driver = Driver(facts=FACTS)
    driver.submit(
        make_submission(1, sampling=sampling, resume_token_ids=[known], delivery=Delivery.FINAL)
    )
    driver.run()
    assert (driver.sent, driver.reason(1), driver.output(1)) == ([], reason, known)
    assert_scheduler_empty(driver)


def test_an_end_of_sequence_that_does_not_count_goes_on():
    driver = Driver(facts=FACTS)
    ignoring = SamplingParams(max_tokens=3, ignore_eos=True)
    driver.submit(make_submission(1, sampling=ignoring, resume_token_ids=[[7, 0]]))
    driver.run()
    assert len(driver.output(1)) == 3
