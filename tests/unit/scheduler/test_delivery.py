import pytest

from pageframe.core.request import Delivery
from pageframe.core.step import FinishReason, TokenLogprobs
from unit.scheduler.driver import GATEWAY, Driver, expected_output, make_submission


def message_sizes(driver: Driver) -> list[int]:
    return [len(message.token_ids) for message in driver.messages]


@pytest.mark.parametrize(
    ("delivery", "sizes"),
    [
        (Delivery.EVERY_TOKEN, [1, 1, 1, 1, 1, 1, 1]),
        (Delivery.COALESCED, [3, 3, 1]),
        (Delivery.FINAL, [7]),
    ],
)
def test_each_delivery_sends_all_tokens_in_order(delivery, sizes):
    driver = Driver()
    submission = make_submission(1, max_tokens=7, delivery=delivery, num_tokens_per_event_max=3)
    driver.submit(submission)
    driver.run()
    assert message_sizes(driver) == sizes
    assert driver.output(1) == expected_output(submission, driver.facts)
    assert driver.messages[-1].completions == [driver.completion(1)]


def test_all_that_a_gateway_must_hear_after_a_step_is_one_message():
    driver = Driver(token_budget=64)
    for handle in (1, 2, 3):
        driver.submit(make_submission(handle, 4, max_tokens=2, request_id=f"a{handle}"))
        driver.submit(make_submission(handle, 4, max_tokens=2, request_id=f"b{handle}"), 2)
    driver.run()
    assert [(m.step, m.handles, len(m.completions)) for m in driver.messages] == [
        (1, [1, 2, 3], 0),
        (1, [1, 2, 3], 0),
        (2, [1, 2, 3], 3),
        (2, [1, 2, 3], 3),
    ]


def test_events_outside_a_step_say_so():
    driver = Driver()
    driver.submit(make_submission(1))
    driver.take(driver.scheduler.cancel(GATEWAY, 1))
    assert [message.step for message in driver.messages] == [0]


def test_a_completion_tells_what_the_sample_cost():
    driver = Driver()
    driver.submit(make_submission(1, 6, max_tokens=4))
    driver.run()
    completion = driver.completion(1)
    assert (completion.handle, completion.sample_index) == (1, 0)
    assert completion.finish_reason is FinishReason.LENGTH
    assert (completion.num_prompt_tokens, completion.num_output_tokens) == (6, 4)
    # Positions 0 to 8 in blocks of four.
    assert completion.account.num_blocks_peak == 3
    assert (completion.error_status, completion.error_limits) == ("", {})


@pytest.mark.parametrize("delivery", list(Delivery))
def test_log_probabilities_stay_with_their_tokens(delivery):
    driver = Driver(lookahead=False)
    for handle, way in ((1, delivery), (2, Delivery.EVERY_TOKEN)):
        driver.submit(
            make_submission(
                handle, max_tokens=5, delivery=way, num_tokens_per_event_max=2, request_id=f"{way}"
            )
            if handle == 1
            else make_submission(handle, max_tokens=5)
        )
    seen = {}
    while not driver.scheduler.is_idle:
        driver.send_plan()
        driver.run_engine()
        result = driver.results[0]
        for index, token_id in enumerate(result.token_ids):
            if result.sampled_ids[index] == 1:
                result.logprobs[index] = TokenLogprobs(token_id=token_id, logprob=-token_id / 10)
        driver.receive()
    for message in driver.messages:
        for index, logprobs in message.logprobs.items():
            assert logprobs.token_id == message.token_ids[index]
            seen[logprobs.token_id] = logprobs.logprob
    assert seen == {token_id: -token_id / 10 for token_id in driver.output(1)}


def test_prompt_log_probabilities_are_sent_once_for_all_samples():
    driver = Driver(lookahead=False)
    driver.submit(make_submission(7, 3, max_tokens=2, num_samples=2))
    driver.send_plan()
    driver.run_engine()
    entries = [TokenLogprobs(token_id=1, logprob=-0.5)]
    driver.results[0].prompt_logprobs = {1: entries, 2: [TokenLogprobs(token_id=9, logprob=-9)]}
    driver.receive()
    driver.run()
    sent = [message.prompt_logprobs for message in driver.messages if message.prompt_logprobs]
    assert sent == [{7: entries}]


def test_a_message_that_holds_only_prompt_log_probabilities_is_sent():
    driver = Driver(lookahead=False)
    driver.submit(make_submission(7, 3, max_tokens=2, delivery=Delivery.FINAL))
    driver.send_plan()
    driver.run_engine()
    driver.results[0].prompt_logprobs = {1: [TokenLogprobs(token_id=1, logprob=-0.5)]}
    driver.receive()
    assert [message.handles for message in driver.messages] == [[]]
