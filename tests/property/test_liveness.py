"""Whatever is preempted, and however, every request comes to its end within bounded steps.

The real engine over the simulated model, in the smallest pool that holds one request: forks, prefix
hits, a host tier of few blocks, lost tails and swaps under every pair of policies. And the executor
learns late that a step has finished, so what victims give up is not there at once: plans are
refused, and must not be for ever.
"""

import random

import pytest

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import StepResult
from pageframe.scheduler.policies.registry import RECOVERY, VICTIM
from property.test_scheduler_engine import MAX_LEN, RealEngine
from unit.scheduler.driver import Driver, assert_scheduler_consistent, make_submission

NUM_STEPS_LATE_MAX = 2


class LateEngine(RealEngine):
    """Hears of the end of a step up to two plans later."""

    def __init__(self, rng: random.Random, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.random = rng
        self.pool = self.engine.memory.pool
        self.complete_now, self.pool.complete = self.pool.complete, self.complete_late
        self.finished_step = 0
        self.num_plans_waited = 0

    def complete_late(self, step: int) -> None:
        self.finished_step = step

    def step(self, plan) -> StepResult:
        is_late = self.num_plans_waited < NUM_STEPS_LATE_MAX and self.random.random() < 0.5
        self.num_plans_waited = self.num_plans_waited + 1 if is_late else 0
        if not is_late:
            self.catch_up()
        return super().step(plan)

    def catch_up(self) -> None:
        if self.finished_step:
            self.complete_now(self.finished_step)


class WatchfulDriver(Driver):
    """Sees to it that nobody is thrown out for someone younger."""

    def send_plan(self):
        plan = super().send_plan()
        running = self.scheduler._roster.running
        for victim_id, beneficiary_id in zip(
            plan.victims.sequence_ids if plan else (),
            plan.victims.beneficiary_ids if plan else (),
            strict=True,
        ):
            # The oldest only for itself: somebody unknown holds blocks, and all start from nothing.
            is_younger = running[victim_id].join_number > running[beneficiary_id].join_number
            assert is_younger or victim_id == beneficiary_id
        return plan


def some_request(rng: random.Random, handle: int):
    num_prompt_tokens = rng.choice([1, 3, 8, 17, 33, 50])
    start = rng.choice([5, 100 * handle])
    return make_submission(
        handle,
        [start + index for index in range(num_prompt_tokens)],
        sampling=SamplingParams(
            temperature=1.0, seed=handle, max_tokens=rng.randint(1, MAX_LEN - num_prompt_tokens)
        ),
        num_samples=rng.choice([1, 1, 2, 4]),
        priority=rng.choice([0, 0, 1]),
    )


def num_steps_alone(requests, token_budget: int) -> int:
    """Steps that serve all samples one after the other, with nothing shared or lost."""
    return sum(
        request.num_samples
        * (-(-len(request.prompt_token_ids) // token_budget) + request.sampling.max_tokens)
        for request in requests
    )


def serve(seed: int, victim: str, recovery: str) -> LateEngine:
    """Serve random requests to their ends, within bounded steps."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16])
    engine = LateEngine(
        rng,
        MAX_LEN // block_size,
        block_size,
        num_host_slots=rng.choice([0, 3, 16 // block_size + 1]),
        has_prefix_cache=rng.random() < 0.7,
    )
    driver = WatchfulDriver(
        facts=engine.facts,
        engine=engine,
        token_budget=rng.choice([2, 7, 40]),
        max_num_running=rng.choice([2, 8, 20]),
        lookahead=rng.random() < 0.7,
        victim_policy=victim,
        recovery=recovery,
    )
    requests = [some_request(rng, handle) for handle in range(1, 13)]
    for request in requests:
        driver.submit(request)
    # A plan may be refused as often as a step is late; the driver counts plans and results.
    num_plans_max = (1 + NUM_STEPS_LATE_MAX) * num_steps_alone(requests, driver.token_budget)
    driver.run(2 * num_plans_max)
    assert_scheduler_consistent(driver.scheduler)
    for request in requests:
        for sample_index in range(request.num_samples):
            num_tokens = len(driver.output(request.handle, sample_index))
            assert num_tokens == request.sampling.max_tokens
    assert driver.faults == []
    engine.catch_up()
    account = engine.engine.account()
    assert account.free + account.cached == account.total
    return engine


@pytest.mark.parametrize("recovery", RECOVERY.built_in)
@pytest.mark.parametrize("victim", VICTIM.built_in)
def test_every_request_ends_in_a_pool_for_one(victim, recovery):
    results: list[StepResult] = []
    for seed in range(3):
        print(f"seed={seed} victim={victim!r} recovery={recovery!r}")
        results += serve(seed, victim, recovery).results
    # That it was hard enough is part of the test.
    assert any(result.preempted_ids for result in results)
    assert any(result.refusal for result in results)
