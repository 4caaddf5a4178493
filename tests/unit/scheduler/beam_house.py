"""Beam searches through the real scheduler and the real engine over the simulated model."""

from pageframe.core.beams import BeamParams, EarlyStopping
from pageframe.core.clock import ManualClock
from pageframe.core.plan import Recovery, StepPlan
from pageframe.core.request import Delivery, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import StepResult
from pageframe.core.trace import NullTraceSink, TraceSink
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.sim import SimConfig, SimCost, SimRunner
from unit.scheduler.driver import Driver, make_submission

MAX_LEN = 64


class BeamEngine:
    """A step engine behind the face that the driver expects; checks the pool after every step."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        num_rows: int = 16,
        eos_probability: float = 0.0,
        **options,
    ) -> None:
        self.clock = ManualClock(1)
        config = SimConfig(
            vocab_size=90,
            max_model_len=MAX_LEN,
            max_num_rows=num_rows,
            eos_probability=eos_probability,
            cost=SimCost(step_ns=1e6),
        )
        self.engine = StepEngine(
            SimRunner(config, self.clock),
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_sequences=num_rows,
            max_step_tokens=64,
            max_model_len=MAX_LEN,
            trace=NullTraceSink(),
            clock=self.clock,
            check_every_step=True,
            **options,
        )
        self.facts = self.engine.describe("real-0")
        self.cancel = self.engine.cancel
        self.results: list[StepResult] = []

    @property
    def memory(self):
        return self.engine.memory

    @property
    def now_ns(self) -> int:
        return self.clock.now_ns()

    @now_ns.setter
    def now_ns(self, value: int) -> None:
        self.clock.advance_ns(value - self.clock.now_ns())

    def account(self):
        return self.engine.account()

    def step(self, plan: StepPlan) -> StepResult:
        result = self.engine.step(plan)
        self.results.append(result)
        return result


def make_driver(
    *,
    max_num_running: int = 12,
    token_budget: int = 32,
    trace: TraceSink | None = None,
    recovery: Recovery = Recovery.RECOMPUTE,
    **options,
) -> Driver:
    engine = BeamEngine(**options)
    return Driver(
        trace=trace or NullTraceSink(),
        recovery=recovery,
        facts=engine.facts,
        engine=engine,
        max_num_running=max_num_running,
        token_budget=token_budget,
    )


def search(
    handle: int,
    prompt: list[int] | int = 6,
    *,
    num_beams: int = 3,
    num_return: int = 1,
    max_tokens: int = 8,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC,
    sampling: SamplingParams | None = None,
    **fields,
) -> Submission:
    fields.setdefault("delivery", Delivery.FINAL)
    return make_submission(
        handle,
        prompt,
        sampling=sampling or SamplingParams(max_tokens=max_tokens),
        num_samples=num_return,
        beams=BeamParams(
            num_beams=num_beams,
            num_return=num_return,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        ),
        **fields,
    )


def alone(submission: Submission, **options) -> list[tuple[list[int], float]]:
    """What a search finds that has a pool to itself: outputs and scores."""
    driver = make_driver(num_blocks=600, num_rows=64, max_num_running=64, **options)
    driver.submit(submission)
    driver.run()
    return found(driver, submission)


def found(driver: Driver, submission: Submission) -> list[tuple[list[int], float]]:
    handle = submission.handle
    return [
        (driver.output(handle, index), driver.completion(handle, index).score)
        for index in range(submission.num_samples)
    ]


def assert_engine_empty(driver: Driver) -> None:
    assert driver.scheduler.is_idle
    assert len(driver.engine.memory.sequences) == 0
    account = driver.engine.account()
    assert account.free + account.cached == account.total
    assert driver.scheduler.take_cancels() == []
