"""Fifty known milliseconds of each cause are found under its name, and nothing else is made up."""

import pytest

from pageframe.core.replica import TenantQuota
from pageframe.core.request import StallCause
from pageframe.core.step import RefusedBecause
from pageframe.scheduler.stalls import Stall, StallMeter, StepClock
from pageframe.testing.fake_engine import FakeEngine, make_facts
from unit.scheduler.driver import Driver, make_submission

MS = 1_000_000
INJECTED_NS = 50 * MS
ROOMY = {"num_blocks": 100, "max_model_len": 400}


def attributed(driver: Driver, handle: int, sample_index: int = 0) -> dict[StallCause, int]:
    """The waits of a sample, after a check that they and its steps are all of its time."""
    completion = driver.completion(handle, sample_index)
    spent_ns = completion.compute_ns + sum(completion.stall_ns.values())
    assert spent_ns == completion.end_ns - completion.submit_ns
    return completion.stall_ns


def assert_found(stall_ns: dict[StallCause, int], cause: StallCause) -> None:
    assert 0.9 * INJECTED_NS <= stall_ns.get(cause, 0) <= 1.2 * INJECTED_NS, stall_ns


def test_waiting_behind_as_many_as_may_run_is_queue():
    driver = Driver(make_facts(**ROOMY), max_num_running=1)
    driver.submit(make_submission(1, 4, max_tokens=50))
    driver.submit(make_submission(2, 4, max_tokens=2))
    driver.run()
    assert_found(attributed(driver, 2), StallCause.QUEUE)


def test_waiting_for_blocks_is_kv_full():
    driver = Driver(make_facts(num_blocks=24, block_size=4), token_budget=99, lookahead=False)
    driver.submit(make_submission(1, 40, max_tokens=50))
    driver.step()
    driver.submit(make_submission(2, 60, max_tokens=2))
    driver.run()
    assert_found(attributed(driver, 2), StallCause.KV_FULL)


def test_waiting_for_room_in_a_step_is_token_budget():
    driver = Driver(make_facts(**ROOMY), token_budget=4, lookahead=False)
    for handle in (1, 2, 3, 4):
        driver.submit(make_submission(handle, 1, max_tokens=58))
    for _ in range(8):
        driver.step()
    driver.submit(make_submission(5, 2, max_tokens=1))
    driver.run()
    assert_found(attributed(driver, 5), StallCause.TOKEN_BUDGET)


def test_waiting_for_ones_own_tenant_is_quota():
    driver = Driver(
        facts := make_facts(num_blocks=60, block_size=4),
        engine=FakeEngine(facts, ceilings={"a": 24}),
        quotas=(TenantQuota(tenant="a", ceiling_blocks=24),),
        token_budget=99,
        lookahead=False,
    )
    driver.submit(make_submission(1, 40, max_tokens=50, tenant="a"))
    driver.step()
    driver.submit(make_submission(2, 60, max_tokens=2, tenant="a"))
    driver.run()
    assert_found(attributed(driver, 2), StallCause.QUOTA)


def test_a_sample_waits_for_the_prompt_that_another_computes():
    driver = Driver(make_facts(**ROOMY), token_budget=4, lookahead=False)
    driver.submit(make_submission(1, 200, max_tokens=2, num_samples=2))
    driver.run()
    assert_found(attributed(driver, 1, 1), StallCause.PREFIX_WAIT)


def test_the_step_before_is_executor():
    driver = Driver(make_facts(**ROOMY))
    driver.submit(make_submission(1, 4, max_tokens=8))
    driver.step()
    driver.submit(make_submission(2, 4, max_tokens=2))
    assert driver.send_plan().announce
    driver.clock.advance_ns(INJECTED_NS)
    driver.run()
    assert_found(attributed(driver, 2), StallCause.EXECUTOR)


def test_a_lost_executor_is_found_with_what_it_made_to_be_computed_again():
    driver = Driver(make_facts(**ROOMY), lookahead=False)
    driver.submit(make_submission(1, 40, max_tokens=8))
    for _ in range(5):
        driver.step()
    driver.lose_executor()
    driver.clock.advance_ns(INJECTED_NS)
    driver.start_executor()
    driver.run()
    stall_ns = attributed(driver, 1)
    assert_found(stall_ns, StallCause.EXECUTOR_LOST)
    # 42 tokens at 16 a step were computed a second time.
    assert stall_ns[StallCause.EXECUTOR_LOST] == INJECTED_NS + 3 * MS


def test_a_victim_waits_and_computes_again_because_it_was_preempted():
    driver = Driver(make_facts(num_blocks=16, block_size=4), lookahead=False)
    driver.submit(make_submission(1, 4, max_tokens=56))
    driver.submit(make_submission(2, 4, max_tokens=30))
    driver.run()
    assert driver.completion(2).account.num_preemptions == 1
    stall_ns = attributed(driver, 2)
    assert stall_ns[StallCause.PREEMPTED] > 20 * MS
    first = attributed(driver, 1)
    assert StallCause.PREEMPTED not in first


def test_no_plan_between_two_steps_is_transport():
    driver = Driver(make_facts(**ROOMY), lookahead=False)
    driver.submit(make_submission(1, 40, max_tokens=8))
    driver.step()
    driver.clock.advance_ns(INJECTED_NS // 2)
    for _ in range(5):
        driver.step()
    driver.clock.advance_ns(INJECTED_NS // 2)
    driver.run()
    assert attributed(driver, 1)[StallCause.TRANSPORT] == INJECTED_NS


class SlowTier(FakeEngine):
    """Whose host tier needs 50 steps for the blocks of sequence 2."""

    num_steps_left = 50

    def _try(self, sequence_id, sequence, num_tokens, chunks):
        if sequence_id == 2 and self.num_steps_left:
            self.num_steps_left -= 1
            return RefusedBecause.PROMOTING, 0
        return super()._try(sequence_id, sequence, num_tokens, chunks)


def test_blocks_on_their_way_from_the_host_are_swap_in():
    driver = Driver(
        facts := make_facts(**ROOMY), engine=SlowTier(facts), token_budget=200, lookahead=False
    )
    driver.submit(make_submission(1, 4, max_tokens=60))
    driver.submit(make_submission(2, 4, max_tokens=2))
    driver.run()
    assert_found(attributed(driver, 2), StallCause.SWAP_IN)


@pytest.mark.parametrize("lookahead", [False, True])
def test_all_time_of_everybody_is_found(lookahead):
    driver = Driver(make_facts(num_blocks=12, block_size=4), token_budget=7, lookahead=lookahead)
    for handle in range(1, 9):
        driver.submit(make_submission(handle, 3 + 2 * handle, max_tokens=12, num_samples=2))
    driver.run()
    for handle in range(1, 9):
        attributed(driver, handle, 0)
        attributed(driver, handle, 1)


def test_a_clock_counts_steps_and_what_is_between_them():
    clock = StepClock()
    clock.land(100, 130)
    clock.land(150, 160)
    assert (clock.busy_ns, clock.idle_ns) == (40, 20)
    assert (clock.busy_at(150), clock.busy_at(160)) == (30, 40)


def test_a_wait_that_ends_before_it_began_is_none():
    meter = StallMeter()
    assert meter.switch(StallCause.QUEUE, 100) is None
    assert meter.switch(StallCause.EXECUTOR, 90) is None
    assert meter.switch(None, 130) == Stall(StallCause.EXECUTOR, 100, 130)
    assert meter.stall_ns == {StallCause.EXECUTOR: 30}
