"""Steps launched before the tokens of those before them are known: nobody may notice.

The scheduler with the real engine over a simulated device, as in ``test_scheduler_engine``; a plan
that may follow a step in flight does. The device reads histories back through block tables, so a
token that came too late, a block that was given away too early or a row that was taken for another
would show.
"""

import random
from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from bench.soak.device import Device
from pageframe.core.clock import ManualClock
from pageframe.core.journal import MemorySetup
from pageframe.core.plan import StepPlan
from pageframe.core.replica import TenantQuota
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import StepResult
from pageframe.core.trace import NullTraceSink
from pageframe.executor.batch import NEWEST, Landed, ModelRunner, StepBatch
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.sim import SimConfig
from pageframe.executor.model.sim_device import SimDevice
from pageframe.lab.replay import replay
from pageframe.scheduler.journal import RecordingScheduler
from property.recording import Notes
from unit.scheduler.driver import Driver, assert_scheduler_consistent, make_submission

MAX_LEN = 64
EOS_TOKEN_ID = 0
_STEP_NS = 1_000_000


@pytest.fixture(autouse=True)
def _no_time_but_the_clocks(monkeypatch):
    monkeypatch.setattr("time.monotonic_ns", lambda: 0)


class PrintFlight(Landed):
    """A step whose fingerprints are written, and whose tokens are told when they are asked for."""

    is_ahead = True


class PrintDevice(Device):
    """A device of fingerprints that has its newest tokens by row."""

    def __init__(self, windows: tuple[int, ...]) -> None:
        super().__init__(
            window_tokens=windows[0] if len(windows) == 1 else 0,
            group_windows=windows if len(windows) > 1 else (),
        )
        self._newest = np.zeros(32, dtype=np.int32)

    def admit(self, row: int, *, sampling: SamplingParams, **sequence) -> None:
        """Who begins alike shares blocks, whatever its seed is."""
        super().admit(row, sampling=replace(sampling, seed=0), **sequence)

    def launch(self, batch: StepBatch) -> PrintFlight:
        rows = np.repeat(batch.rows, np.diff(batch.query_start))
        is_coming = batch.token_ids == NEWEST
        token_ids = np.where(is_coming, self._newest[rows], batch.token_ids)
        output = self.execute(replace(batch, token_ids=token_ids))
        self._newest[batch.sample_rows] = output.token_ids
        return PrintFlight(output)


class AheadEngine:
    """A step engine behind the face that the driver expects, but that steps stay in flight.

    Attributes:
        is_ahead: Whether a step may follow another before that one is collected.
        ended: Results of steps that have ended and nobody has taken.
        results: All of them.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, is_ahead: bool, device: ModelRunner | None = None
    ) -> None:
        self.clock = ManualClock(1)
        self.is_ahead = is_ahead
        sim = SimConfig(max_model_len=MAX_LEN, max_num_rows=32, eos_probability=0.05)
        self.engine = StepEngine(
            device or SimDevice(sim),
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_sequences=32,
            max_step_tokens=256,
            max_model_len=MAX_LEN,
            trace=NullTraceSink(),
            clock=self.clock,
            check_every_step=True,
        )
        self.facts = self.engine.describe("ahead-0")
        self.ended: deque[StepResult] = deque()
        self.results: list[StepResult] = []

    @property
    def now_ns(self) -> int:
        return self.clock.now_ns()

    @now_ns.setter
    def now_ns(self, value: int) -> None:
        self.clock.advance_ns(value - self.clock.now_ns())

    def launch(self, plan: StepPlan) -> None:
        if self.engine.launching.num_in_flight and not (
            self.is_ahead and self.engine.launching.may_follow(plan)
        ):
            self.collect()
        self.engine.launch(plan)
        self.clock.advance_ns(_STEP_NS)
        if self.engine.launching.num_in_flight > 1:
            self.collect()
        if self.engine.launching.flight_under_way() is None:
            self.collect()

    def collect(self) -> None:
        self.ended.append(self.engine.collect())
        self.results.append(self.ended[-1])

    def cancel(self, sequence_ids: list[int]) -> StepResult:
        return self.engine.cancel(sequence_ids)


class AheadDriver(Driver):
    """A driver whose engine may have a step in flight."""

    def run_engine(self, *, refuse: bool = False) -> None:
        assert not refuse
        self.engine.now_ns = max(self.engine.now_ns, self.clock.now_ns())
        if self.plans:
            self.engine.launch(self.plans.popleft())
        else:
            self.engine.collect()
        self.take_ended()

    def send_cancels(self) -> None:
        cancels = self.scheduler.take_cancels()
        if cancels:
            while self.engine.engine.launching.num_in_flight:
                self.engine.collect()
            self.take_ended()
            self.results.append(self.engine.cancel(cancels))

    def take_ended(self) -> None:
        self.results += self.engine.ended
        self.engine.ended.clear()
        self.clock.advance_ns(max(0, self.engine.now_ns - self.clock.now_ns()))

    def run(self, num_steps_max: int = 10_000) -> int:
        for num_steps in range(num_steps_max):
            while self.send_plan() is not None:
                pass
            if self.results:
                self.receive()
            elif self.plans or self.engine.engine.launching.num_in_flight:
                self.run_engine()
            else:
                assert self.scheduler.is_idle, self.scheduler.snapshot()
                return num_steps
        raise AssertionError(f"not done: {self.scheduler.snapshot()}")


def make_driver(
    num_blocks: int,
    block_size: int,
    *,
    is_ahead: bool = True,
    device: ModelRunner | None = None,
    **fields,
) -> Driver:
    engine = AheadEngine(num_blocks, block_size, is_ahead=is_ahead, device=device)
    return AheadDriver(facts=engine.facts, engine=engine, max_num_running=20, **fields)


def make_request(handle: int, rng: random.Random, vocab_size: int):
    """Half of them begin alike; they end by their length, by a token of their own, or by any."""
    start = 5 if handle % 2 else 100 * handle
    return make_submission(
        handle,
        [(start + index) % vocab_size for index in range(rng.choice([1, 2, 7, 16, 33]))],
        sampling=SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            seed=handle,
            max_tokens=rng.choice([1, 2, 9, 31]),
            min_tokens=rng.choice([0, 0, 1]),
            ignore_eos=handle % 3 == 0,
            stop_token_ids=() if handle % 3 == 0 else (7,),
        ),
        num_samples=rng.choice([1, 1, 3]),
        tenant="ab"[handle % 2],
    )


def serve(driver: Driver, seed: int) -> dict:
    """Requests that come while others run, some of which are cancelled."""
    rng = random.Random(seed)
    for handle in range(1, 31):
        driver.submit(make_request(handle, rng, driver.facts.vocab_size))
        for _ in range(rng.choice([0, 0, 3, 12])):
            while driver.send_plan() is not None:
                pass
            if driver.results:
                driver.receive()
            elif driver.plans:
                driver.run_engine()
            assert_scheduler_consistent(driver.scheduler)
    driver.run()
    return driver.tokens


def assert_engine_empty(driver: Driver) -> None:
    engine = driver.engine.engine
    assert engine.is_idle
    account = engine.account()
    assert account.free + account.cached == account.total
    assert engine.check_integrity() == []


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("num_blocks", "block_size"), [(1000, 4), (200, 4), (40, 4), (400, 1), (24, 16)]
)
def test_tokens_do_not_depend_on_what_was_launched_ahead(num_blocks, block_size, seed):
    print("seed", seed)
    alone = serve(make_driver(1000, 4, is_ahead=False), seed)
    driver = make_driver(num_blocks, block_size, token_budget=64)
    assert serve(driver, seed) == alone
    results = driver.engine.results
    if num_blocks == 1000:
        assert sum(result.is_followed for result in results) > 20
    assert not any(result.refusal for result in results)
    assert_engine_empty(driver)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_blocks", [400, 60])
@pytest.mark.parametrize("windows", [(6,), (0, 6), (5, 0, 9)], ids=str)
def test_windows_are_left_behind_the_step_that_follows(windows, num_blocks, seed):
    print("seed", seed)
    num_blocks *= len(windows)
    device = PrintDevice(windows)
    alone = serve(make_driver(2000, 4, is_ahead=False, device=PrintDevice(windows)), seed)
    driver = make_driver(num_blocks, 4, device=device, token_budget=64)
    assert serve(driver, seed) == alone
    assert any(7 in tokens for tokens in alone.values()), "nobody ended by a token"
    assert sum(result.is_followed for result in driver.engine.results) > 20
    assert_engine_empty(driver)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ceiling", [400, 40])
def test_tenants_keep_their_bounds(ceiling, seed):
    print("seed", seed)
    quotas = (
        TenantQuota(tenant="a", ceiling_blocks=ceiling),
        TenantQuota(tenant="b", floor_blocks=50),
    )
    alone = serve(make_driver(1000, 4, is_ahead=False), seed)
    driver = make_driver(600, 4, token_budget=64, quotas=quotas)
    engine = driver.engine.engine
    engine.desk.replace_quotas(quotas)
    assert serve(driver, seed) == alone
    assert not any(result.refusal for result in driver.engine.results)
    if ceiling == 400:
        assert sum(result.is_followed for result in driver.engine.results) > 20
    assert_engine_empty(driver)


def test_one_who_ended_computes_one_token_more_at_most():
    driver = make_driver(1000, 4, token_budget=64)
    serve(driver, 1)
    num_tokens = [len(tokens) for tokens in driver.tokens.values()]
    sampled = sum(len(result.token_ids) for result in driver.engine.results)
    assert sampled == sum(num_tokens), "a token was reported that nobody asked for"
    assert any(tokens and tokens[-1] == EOS_TOKEN_ID for tokens in driver.tokens.values())


class RecordedDriver(AheadDriver):
    """The same, with a journal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.notes = Notes()
        self.scheduler = RecordingScheduler(
            self.facts,
            self.scheduler._options,
            trace=self.trace,
            clock=self.clock,
            journal=self.notes,
            memory=MemorySetup(),
        )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_blocks", [1000, 60])
def test_a_journal_of_it_replays_to_the_same_results(num_blocks, seed):
    print("seed", seed)
    engine = AheadEngine(num_blocks, 4, is_ahead=True)
    driver = RecordedDriver(facts=engine.facts, engine=engine, max_num_running=20, token_budget=64)
    serve(driver, seed)
    assert any(result.is_followed for result in engine.results)
    report = replay(driver.notes.entries)
    assert report.is_same, report.difference
    assert report.memory_stopped == ""
    assert report.num_results == report.num_results_same == len(engine.results)
