"""When the plan behind a long step is made, and who is in it."""

import math

import pytest

from pageframe.testing.fake_engine import make_facts
from unit.scheduler.driver import (
    Driver,
    assert_scheduler_empty,
    expected_output,
    make_submission,
)

# What a token of prefill is expected to take once a step of 4 tokens was seen to take 1 ms: the
# mean of those and of the prior, one token that takes no time, which has faded a little.
TOKEN_NS = 1_000_000 / (math.exp(-4 / 16_384) + 4)


def make_driver() -> Driver:
    """One with room for a thousand tokens in a step, which has seen none."""
    facts = make_facts(num_blocks=1000, block_size=16, max_model_len=2000, max_step_tokens=1000)
    return Driver(facts=facts, token_budget=1000)


def behind_a_step() -> Driver:
    """One that has seen a step of 4 tokens."""
    driver = make_driver()
    driver.submit(make_submission(100, 4, max_tokens=1))
    driver.run()
    return driver


def behind_a_long_step(num_tokens: int = 600) -> Driver:
    """One whose step of ``num_tokens`` has just begun; its sequence decodes afterwards."""
    driver = behind_a_step()
    driver.submit(make_submission(1, num_tokens, max_tokens=5))
    assert driver.send_plan() is not None
    return driver


def asked(plan) -> list[int]:
    """Tokens of its entries."""
    return list(plan.may.num_tokens)


def test_who_comes_while_a_long_step_runs_is_in_the_next_one():
    driver = behind_a_long_step()
    assert driver.send_plan() is None
    newcomer = make_submission(2, 7)
    driver.submit(newcomer)
    assert driver.send_plan() is None
    driver.wait_until_due()
    plan = driver.send_plan()
    assert (plan.step, asked(plan)) == (3, [7])
    assert driver.send_plan() is None
    driver.run()
    assert driver.output(2) == expected_output(newcomer, driver.facts)
    assert_scheduler_empty(driver)


def test_it_is_due_when_half_of_the_prefill_should_be_done():
    driver = behind_a_long_step()
    now_ns = driver.clock.now_ns()
    assert driver.scheduler.plan_due_ns(now_ns) == now_ns + int(600 * TOKEN_NS) // 2
    driver.clock.advance_ns(int(600 * TOKEN_NS) // 2 - 1)
    assert driver.send_plan() is None
    driver.clock.advance_ns(1)
    plan = driver.send_plan()
    assert (plan.step, plan.builds_on, asked(plan)) == (3, 2, [])


def test_a_plan_that_is_full_waits_for_nobody():
    driver = behind_a_long_step()
    # The first takes one token of a thousand.
    driver.submit(make_submission(2, 998))
    assert driver.send_plan() is None
    driver.submit(make_submission(3, 1))
    assert asked(driver.send_plan()) == [998, 1]


def test_a_result_ends_the_wait():
    driver = behind_a_long_step()
    driver.submit(make_submission(2, 7))
    driver.run_engine()
    assert driver.scheduler.plan_due_ns(driver.clock.now_ns()) > 0
    driver.receive()
    assert driver.scheduler.plan_due_ns(driver.clock.now_ns()) == 0
    assert asked(driver.send_plan()) == [7]


def test_behind_a_short_step_nothing_waits():
    driver = behind_a_long_step(num_tokens=int(20_000_000 / TOKEN_NS))
    assert driver.send_plan() is not None
    driver = behind_a_long_step(num_tokens=int(20_000_000 / TOKEN_NS) + 1)
    assert driver.send_plan() is None


def test_a_prefill_goes_on_without_a_wait():
    driver = behind_a_long_step(num_tokens=1500)
    assert asked(driver.send_plan()) == [500]


def test_nothing_waits_before_a_step_was_seen():
    driver = make_driver()
    driver.submit(make_submission(1, 600, max_tokens=5))
    assert driver.send_plan() is not None
    assert driver.send_plan() is not None


def test_where_prompts_are_mostly_found_nothing_waits():
    driver = behind_a_step()
    for handle in range(1, 21):
        # They take no longer than the decodes behind them.
        driver.submit(make_submission(handle, 600, max_tokens=5))
        driver.run()
    driver.submit(make_submission(21, 600, max_tokens=5))
    assert driver.send_plan() is not None
    assert driver.send_plan() is not None


def test_an_executor_that_is_lost_leaves_nothing_to_wait_for():
    driver = behind_a_long_step()
    assert driver.send_plan() is None
    driver.lose_executor()
    assert driver.scheduler.plan_due_ns(driver.clock.now_ns()) == 0
    driver.start_executor()
    assert driver.send_plan() is not None
    assert driver.send_plan() is None
    driver.run()
    assert_scheduler_empty(driver)


@pytest.mark.parametrize("num_waiting", [1, 3])
def test_a_burst_takes_no_step_of_its_own_for_the_first_of_it(num_waiting: int):
    driver = behind_a_long_step()
    for handle in range(2, 2 + num_waiting):
        assert driver.send_plan() is None
        driver.submit(make_submission(handle, 10, max_tokens=5))
    driver.run()
    # A warm-up, two steps of prefill, and four more tokens.
    assert driver.engine.steps == [4, 600, 1 + 10 * num_waiting] + [1 + num_waiting] * 3 + [
        num_waiting
    ]
