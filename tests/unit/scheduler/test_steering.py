"""Prefill is cut so that steps stay within a target, on machines that nobody measured before."""

import random
from collections.abc import Callable

import pytest

from pageframe.core.step import StepResult, StepTiming
from pageframe.scheduler.flights import Flight
from pageframe.scheduler.steering import (
    NUM_PREFILL_TOKENS_MIN,
    Allowance,
    Steering,
    StepLoad,
    StepTimes,
    load_of,
)
from unit.scheduler.driver import Driver, make_submission

MS = 1_000_000
TARGET_NS = 12 * MS
# Nanoseconds: base, decode, context, prefill beside decodes, prefill token, pair.
COSTS = (4.4e6, 5e3, 38.0, 0.4e6, 24e3, 1.5)


def true_ns(load: StepLoad) -> float:
    """How long a step of ``load`` lasts on the played machine."""
    values = (
        1,
        load.num_decodes,
        load.num_context,
        load.num_tokens > 0,
        load.num_tokens,
        load.num_pairs,
    )
    return sum(cost * value for cost, value in zip(COSTS, values, strict=True))


class Machine:
    """Steps that decode, beside prompts of which each takes what it is allowed."""

    def __init__(self, target_ns: int = TARGET_NS, num_decodes: int = 32) -> None:
        self.steering = Steering(target_ns)
        self.num_decodes = num_decodes
        self.num_context = num_decodes * 1000
        self.num_drafted = 0
        self.position = 0
        self.num_steps = 0
        self.steered = False
        self.now_ns = 1
        self.slowness: Callable[[], float] = lambda: 1.0

    def warm_up(self) -> None:
        """Decodes alone, then prompts beside them, a few times over."""
        for index in range(150):
            self.step(with_prefill=index % 50 > 10)

    def step(self, *, with_prefill: bool = True) -> tuple[int, int]:
        """Run a step; returns its prefill tokens and its nanoseconds."""
        self.num_steps += 1
        flight = Flight(
            step=self.num_steps,
            builds_on=self.num_steps - 1,
            tick=self.num_steps,
            planned_ns=self.now_ns,
            num_decodes=self.num_decodes,
            num_context=self.num_context,
        )
        result = StepResult(step=self.num_steps, num_drafted=[self.num_drafted])
        load = StepLoad(
            self.num_decodes + self.num_drafted, self.num_context + 1000 * self.num_drafted
        )
        num_tokens = 0
        if with_prefill:
            allowance = self.steering.allowance(flight)
            assert allowance is not None
            num_tokens = min(allowance.num_tokens_at(self.position), 4000 - self.position)
            load.add_chunk(self.position, num_tokens)
            result.first_positions = [self.position]
            self.position += num_tokens
            result.computed_ids, result.num_computed = [1], [self.position]
            self.position %= 4000
        if self.steered:
            load.add_chunk(50, 1)
            result.first_positions.append(50)
            result.computed_ids.append(2)
            result.num_computed.append(51)
        lasted_ns = round(true_ns(load) * self.slowness())
        result.timing = StepTiming(start_ns=self.now_ns, execute_ns=lasted_ns)
        self.now_ns += lasted_ns
        self.steering.observe(flight, result)
        return num_tokens, lasted_ns


def test_without_a_target_or_without_decodes_nothing_is_bounded():
    flight = Flight(step=1, builds_on=0, tick=1, planned_ns=0, num_decodes=3)
    assert Steering(0).allowance(flight) is None
    flight.num_decodes = 0
    assert Steering(TARGET_NS).allowance(flight) is None


def test_without_a_target_nothing_is_learnt():
    machine = Machine(target_ns=0)
    machine.step(with_prefill=False)
    assert machine.steering.times.predict_ns(StepLoad(1, 1)) == 0


@pytest.mark.parametrize("position", [0, 777, 100_000])
def test_a_chunk_is_the_largest_that_fits(position):
    allowance = Allowance(7_000_000, 24e3, 1.5, 10_000)
    num_tokens = allowance.num_tokens_at(position)
    assert num_tokens > NUM_PREFILL_TOKENS_MIN

    def needed_ns(num_tokens: int) -> float:
        load = StepLoad()
        load.add_chunk(position, num_tokens)
        return 24e3 * load.num_tokens + 1.5 * load.num_pairs

    assert needed_ns(num_tokens) <= 7_000_000 < needed_ns(num_tokens + 1)


def test_what_one_chunk_takes_the_next_does_not_get():
    allowance = Allowance(24e3 * 200, 24e3, 0.0, 10_000)
    assert allowance.num_tokens_at(0) == 200
    allowance.take(0, 150)
    assert allowance.num_tokens_at(0) == 50
    allowance.take(0, 50)
    assert allowance.num_tokens_at(0) == 0


def test_a_target_that_cannot_be_met_starves_nobody():
    allowance = Allowance(-5 * MS, 24e3, 1.5, 10_000)
    assert allowance.num_tokens_at(3000) == NUM_PREFILL_TOKENS_MIN
    allowance.take(3000, 10)
    assert allowance.num_tokens_at(0) == NUM_PREFILL_TOKENS_MIN - 10
    allowance.take(0, 6)
    assert allowance.num_tokens_at(0) == 0


def test_chunks_grow_from_small_ones_until_the_target_bounds_them():
    machine = Machine()
    for _ in range(2):
        assert machine.step()[0] == 0
    chunks = [machine.step()[0] for _ in range(12)]
    assert chunks[:4] == [16, 32, 64, 128]
    assert all(later <= 2 * max(chunks[:index]) for index, later in enumerate(chunks) if index)
    left_ns = TARGET_NS - true_ns(StepLoad(machine.num_decodes, machine.num_context)) - COSTS[3]
    assert left_ns / COSTS[4] * 0.7 < max(chunks) < left_ns / COSTS[4]


def test_prediction_comes_true_for_loads_that_were_not_measured():
    machine = Machine()
    machine.warm_up()
    for num_decodes, position, num_tokens in [(32, 0, 250), (32, 3500, 100), (20, 2000, 200)]:
        load = StepLoad(num_decodes, num_decodes * 1100)
        load.add_chunk(position, num_tokens)
        assert machine.steering.times.predict_ns(load) == pytest.approx(true_ns(load), rel=0.06)


def test_steps_stay_within_the_target_beside_prompts_of_any_position():
    machine = Machine()
    lasted = [machine.step(with_prefill=index % 40 < 30)[1] for index in range(2000)]
    assert max(lasted[20:]) <= TARGET_NS
    assert machine.steering.times.error < 0.02


@pytest.mark.parametrize("slowness", [1.5, 2.0])
def test_a_machine_that_slows_down_is_known_to_be_slow_after_a_few_steps(slowness):
    machine = Machine(target_ns=20 * MS)
    machine.warm_up()
    machine.slowness = lambda: slowness
    lasted = [machine.step()[1] for _ in range(30)]
    assert lasted[0] > 20 * MS
    assert max(lasted[4:]) <= 20 * MS
    machine.slowness = lambda: 1.0
    chunks = [machine.step()[0] for _ in range(60)]
    assert chunks[-1] > 1.2 * chunks[0]


def test_decodes_alone_tell_that_prefill_has_become_slower_too():
    machine = Machine(target_ns=20 * MS)
    machine.warm_up()
    machine.slowness = lambda: 2.0
    for _ in range(20):
        machine.step(with_prefill=False)
    lasted = [machine.step()[1] for _ in range(4)]
    assert lasted[0] <= 1.1 * 20 * MS
    assert max(lasted[2:]) <= 20 * MS


def test_what_prefill_costs_is_not_forgotten_while_only_decodes_run():
    machine = Machine()
    machine.warm_up()
    for _ in range(5000):
        machine.step(with_prefill=False)
    num_tokens, lasted_ns = machine.step()
    assert lasted_ns <= TARGET_NS
    assert num_tokens > 100


def test_one_slow_step_is_forgotten_soon():
    machine = Machine()
    machine.warm_up()
    usual = machine.step()[0]
    machine.slowness = lambda: 100.0
    machine.step()
    machine.slowness = lambda: 1.0
    chunks = [machine.step()[0] for _ in range(40)]
    assert max(chunks[:8]) > 0.5 * usual
    assert max(chunks[-10:]) > 0.8 * usual


@pytest.mark.parametrize("seed", range(5))
def test_where_steps_vary_one_aims_lower(seed):
    print(f"seed={seed}")
    rng = random.Random(seed)
    machine = Machine()
    machine.slowness = lambda: max(0.8, rng.gauss(1.0, 0.04))
    lasted = [machine.step()[1] for _ in range(1000)][50:]
    assert sum(ns > TARGET_NS for ns in lasted) <= 0.01 * len(lasted)
    assert sum(lasted) / len(lasted) > 0.75 * TARGET_NS


@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_drifts_is_followed(seed):
    print(f"seed={seed}")
    rng = random.Random(seed)
    machine = Machine()
    slowness = 1.0

    def drift() -> float:
        nonlocal slowness
        slowness = min(max(slowness * rng.gauss(1.0, 0.02), 0.7), 1.8)
        return slowness

    machine.slowness = drift
    lasted = [machine.step(with_prefill=rng.random() < 0.7)[1] for _ in range(2000)][50:]
    assert sum(ns > TARGET_NS for ns in lasted) <= 0.02 * len(lasted)


def test_a_draft_token_counts_as_one_more_decode():
    flight = Flight(step=1, builds_on=0, tick=1, planned_ns=0, num_decodes=4, num_context=400)
    result = StepResult(step=1, drafted_ids=[1, 3], num_drafted=[3, 1], num_accepted=[1, 0])
    assert load_of(flight, result) == StepLoad(num_decodes=8, num_context=800)


def test_drafts_of_late_leave_less_for_prefill():
    allowed = []
    for num_drafted in (0, 32):
        machine = Machine()
        machine.num_drafted = num_drafted
        machine.warm_up()
        allowed.append(machine.step()[0])
    # 32 draft tokens at 1,000 positions take 1.4 ms, which is 58 tokens of prefill.
    assert 40 < allowed[0] - allowed[1] < 80


def test_another_executor_is_learnt_anew():
    machine = Machine()
    for _ in range(50):
        machine.step()
    machine.steering.forget()
    assert [machine.step()[0] for _ in range(4)] == [0, 0, NUM_PREFILL_TOKENS_MIN, 32]


def test_a_step_now_and_then_shows_what_decodes_cost_alone():
    machine = Machine()
    chunks = [machine.step()[0] for _ in range(500)]
    assert [index for index, num_tokens in enumerate(chunks) if not num_tokens] == [
        0, 1, 102, 203, 304, 405,
    ]  # fmt: skip


def test_entries_in_every_step_starve_no_prefill():
    machine = Machine()
    machine.steered = True
    chunks = [machine.step()[0] for _ in range(300)]
    assert chunks.count(0) == 2 + 2


def test_costs_are_never_negative():
    times = StepTimes()
    for num_tokens in (10, 1, 20, 1):
        load = StepLoad(4, 100)
        load.add_chunk(0, num_tokens)
        times.learn(load, (21 - num_tokens) * MS)
    assert min(times.prefill_costs_ns) >= 0


def test_the_scheduler_cuts_a_long_prompt_beside_decodes_and_not_when_it_is_alone():
    driver = Driver(token_budget=200, target_itl_ns=1)
    driver.submit(make_submission(1, 60, max_tokens=40))
    driver.step()
    assert driver.sent[0].may.num_tokens == [60]
    driver.submit(make_submission(2, 100, max_tokens=2))
    for _ in range(12):
        driver.step()
    chunks = [n for plan in driver.sent[1:] for n in plan.may.num_tokens]
    # The first step of both shows what the decodes cost alone.
    assert chunks == [16] * 6 + [4]
    assert [len(plan.may) for plan in driver.sent[1:4]] == [0, 0, 1]
    driver.run()
    assert len(driver.output(2)) == 2
