"""The scheduler with the real engine over the simulated model, which reads its history through
block tables: a token that depends on how it was scheduled would show.
"""

import functools
import random

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.step import FinishReason, StepPlan, StepResult
from pageframe.core.trace import NullTraceSink
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.sim import SimConfig, SimCost, SimRunner
from unit.scheduler.driver import Driver, assert_scheduler_consistent, make_submission

MAX_LEN = 64
REQUESTS = [
    (num_prompt_tokens, max_tokens)
    for num_prompt_tokens in (1, 2, 7, 16, 33)
    for max_tokens in (1, 2, 9, 31)
]


class RealEngine:
    """A step engine behind the face that the driver expects."""

    def __init__(self, num_blocks: int, block_size: int, max_step_tokens: int = 256) -> None:
        self.clock = ManualClock(1)
        runner = SimRunner(
            SimConfig(max_model_len=MAX_LEN, max_num_rows=32, cost=SimCost(step_ns=1e6)),
            self.clock,
        )
        self.engine = StepEngine(
            runner,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_sequences=32,
            max_step_tokens=max_step_tokens,
            max_model_len=MAX_LEN,
            trace=NullTraceSink(),
            clock=self.clock,
            check_every_step=True,
        )
        self.facts = self.engine.describe("real-0")
        self.cancel = self.engine.cancel
        self.results: list[StepResult] = []

    @property
    def now_ns(self) -> int:
        return self.clock.now_ns()

    @now_ns.setter
    def now_ns(self, value: int) -> None:
        self.clock.advance_ns(value - self.clock.now_ns())

    def step(self, plan: StepPlan) -> StepResult:
        result = self.engine.step(plan)
        self.results.append(result)
        return result


def make_driver(num_blocks: int, block_size: int, **fields) -> Driver:
    engine = RealEngine(num_blocks, block_size)
    return Driver(facts=engine.facts, engine=engine, max_num_running=20, **fields)


def serve(driver: Driver) -> dict[int, list[int]]:
    for handle, (num_prompt_tokens, max_tokens) in enumerate(REQUESTS, 1):
        driver.submit(make_submission(handle, num_prompt_tokens, max_tokens=max_tokens))
    driver.run()
    return {handle: driver.output(handle) for handle in range(1, len(REQUESTS) + 1)}


@functools.cache
def undisturbed() -> dict[int, list[int]]:
    driver = make_driver(1000, 16, token_budget=256, lookahead=False)
    outputs = serve(driver)
    assert not any(result.preempted_ids for result in driver.engine.results)
    return outputs


def assert_engine_empty(driver: Driver) -> None:
    engine = driver.engine.engine
    assert engine.is_idle
    account = engine.account()
    assert account.free == account.total
    assert engine.check_integrity() == []


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("token_budget", [1, 7, 64])
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_tokens_do_not_depend_on_pool_chunks_blocks_or_look_ahead(
    block_size, token_budget, lookahead
):
    num_blocks = MAX_LEN // block_size
    driver = make_driver(num_blocks, block_size, token_budget=token_budget, lookahead=lookahead)
    assert serve(driver) == undisturbed()
    assert not any(result.refusal for result in driver.engine.results)
    if block_size == 1 and token_budget > 1:
        assert any(result.preempted_ids for result in driver.engine.results)
    assert_engine_empty(driver)


@pytest.mark.parametrize("seed", range(10))
def test_cancels_and_refused_plans_disturb_nobody_else(seed):
    print(f"seed={seed}")
    rng = random.Random(seed)
    driver = make_driver(rng.choice([8, 16, 40]), 8, token_budget=rng.choice([3, 16, 64]))
    requests = list(enumerate(REQUESTS, 1))
    cancelled = set()
    while requests or not driver.scheduler.is_idle:
        act = rng.random()
        if requests and act < 0.2:
            handle, (num_prompt_tokens, max_tokens) = requests.pop(0)
            driver.submit(make_submission(handle, num_prompt_tokens, max_tokens=max_tokens))
        elif act < 0.25:
            handle = rng.randint(1, len(REQUESTS))
            cancelled.add(handle)
            driver.take(driver.scheduler.cancel(1, handle))
        elif act < 0.28 and driver.plans:
            driver.run_engine(refuse=True)
        elif act < 0.5:
            driver.send_plan()
        elif act < 0.75 and driver.plans:
            driver.run_engine()
        elif driver.results:
            driver.receive()
        assert_scheduler_consistent(driver.scheduler)
    for handle, expected in undisturbed().items():
        tokens, completion = driver.output(handle), driver.completion(handle)
        assert tokens == expected[: len(tokens)]
        if completion.finish_reason is FinishReason.CANCELLED:
            assert handle in cancelled
        else:
            assert tokens == expected
    assert_engine_empty(driver)
