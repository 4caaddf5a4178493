"""Runs of a scheduler and of KV memory that keep a journal, for tests of replaying them."""

import contextlib
import dataclasses
import io
import random

from pageframe.core.clock import ManualClock
from pageframe.core.errors import DeadlineError, InvalidRequestError
from pageframe.core.journal import (
    Entry,
    MemorySetup,
)
from pageframe.core.plan import StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import StepResult
from pageframe.core.trace import NullTraceSink
from pageframe.executor.batch import StepBatch, StepOutput
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.sim import SimConfig, SimCost, SimRunner
from pageframe.scheduler.journal import Journal, RecordingScheduler
from pageframe.wire.journal import JournalReader
from unit.scheduler.driver import Driver, make_submission

MAX_LEN = 128
NUM_BLOCKS = 90
BLOCK_SIZE = 4


class Notes(Journal):
    """A journal in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, record: bytes, now_ns: int) -> None:
        self.data += record

    @property
    def entries(self) -> list[Entry]:
        return list(JournalReader(io.BytesIO(bytes(self.data))))


class GroupedRunner(SimRunner):
    """Computes the one group of layers that sees everything; the others are there as well."""

    group = 0

    def execute(self, batch: StepBatch) -> StepOutput:
        num_groups = self.facts.num_kv_groups
        return super().execute(
            dataclasses.replace(
                batch,
                slots=batch.slots[self.group :: num_groups],
                block_tables=batch.block_tables[:, self.group :: num_groups],
            )
        )


class MoodyRunner(GroupedRunner):
    """Has grammars that are ready when they please, and outputs that leave theirs."""

    def __init__(self, config: SimConfig, clock: ManualClock) -> None:
        super().__init__(config, clock)
        self.facts = dataclasses.replace(self.facts, takes_grammars=True)
        self.rng = random.Random(3)
        self.frail_rows: set[int] = set()

    def prepare(self, sampling: SamplingParams, wait_s: float = 0.0) -> bool:
        return self.rng.random() < 0.3

    def admit(self, row: int, *, sampling: SamplingParams, **rest) -> None:
        text = sampling.grammar.text if sampling.grammar else ""
        if text == "never":
            raise InvalidRequestError("GRAMMAR_MISMATCH", "the output does not follow the grammar")
        if text == "frail":
            self.frail_rows.add(row)
        super().admit(row, sampling=sampling, **rest)

    def release(self, row: int) -> None:
        self.frail_rows.discard(row)
        super().release(row)

    def execute(self, batch: StepBatch) -> StepOutput:
        output = super().execute(batch)
        for index, row in enumerate(batch.sample_rows.tolist()):
            if row in self.frail_rows and self.rng.random() < 0.2:
                output.token_ids[index] = self.facts.eos_token_ids[0]
                output.failures[row] = "GRAMMAR_TOO_COMPLEX"
        return output


class PlayedEngine:
    """A step engine behind the face that the driver expects; several may share a clock."""

    def __init__(
        self,
        clock,
        vocab_size: int = 32_000,
        windows: tuple[int, ...] = (0,),
        kind: type[GroupedRunner] = GroupedRunner,
    ) -> None:
        self.made_with = (vocab_size, windows, kind)
        runner = kind(
            SimConfig(
                vocab_size=vocab_size,
                max_model_len=MAX_LEN,
                max_num_rows=32,
                eos_probability=0.01,
                cost=SimCost(step_ns=1e6, prefill_token_ns=1e4),
            ),
            clock,
        )
        runner.facts = dataclasses.replace(
            runner.facts,
            window_tokens=windows[0] if len(windows) == 1 else 0,
            group_windows=windows if len(windows) > 1 else (),
        )
        runner.group = windows.index(0) if len(windows) > 1 else 0
        self.clock = clock
        self.engine = StepEngine(
            runner,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_num_sequences=32,
            max_step_tokens=256,
            max_model_len=MAX_LEN,
            trace=NullTraceSink(),
            clock=clock,
            num_host_slots=40,
        )
        self.facts = self.engine.describe("played")
        self.cancel = self.engine.cancel
        self.account = self.engine.account
        self.results: list[StepResult] = []

    @property
    def now_ns(self) -> int:
        return self.clock.now_ns()

    @now_ns.setter
    def now_ns(self, value: int) -> None:
        assert value == self.clock.now_ns()

    def step(self, plan: StepPlan) -> StepResult:
        result = self.engine.step(plan)
        self.results.append(result)
        return result


class Recording(Driver):
    """A driver whose scheduler keeps a journal; executors of its own come and go."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.engine.__init__(self.clock, *self.engine.made_with)
        self.notes = Notes()
        self.scheduler = RecordingScheduler(
            self.facts,
            self.scheduler._options,
            trace=self.trace,
            clock=self.clock,
            journal=self.notes,
            memory=MemorySetup(),
        )

    def another_executor(self) -> None:
        self.lose_executor()
        for _ in range(3):
            assert self.send_plan() is None
        results = self.engine.results
        self.engine = PlayedEngine(self.clock, *self.engine.made_with)
        self.engine.results = results
        now_ns = self.clock.now_ns()
        account = self.engine.account()
        self.take(self.scheduler.on_executor_ready(self.facts, account, now_ns))

    def same_executor_again(self) -> None:
        self.lose_executor()
        self.engine.engine.reset()
        now_ns = self.clock.now_ns()
        account = self.engine.account()
        self.take(self.scheduler.on_executor_ready(self.facts, account, now_ns))


def make_recording(
    vocab_size: int = 32_000,
    windows: tuple[int, ...] = (0,),
    kind: type[GroupedRunner] = GroupedRunner,
    **options,
) -> Recording:
    engine = PlayedEngine(ManualClock(1_000_000), vocab_size, windows, kind)
    options.setdefault("max_num_running", 24)
    options.setdefault("token_budget", 64)
    return Recording(facts=engine.facts, engine=engine, **options)


def random_submission(handle: int, rng: random.Random, now_ns: int):
    start = rng.choice([5, 5, 5, 100 * (handle % 300)])
    num_prompt_tokens = rng.choice([1, 3, 9, 20, 33, 64])
    return make_submission(
        handle,
        [start + index for index in range(num_prompt_tokens)],
        sampling=SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            seed=handle,
            max_tokens=rng.choice([1, 4, 20, 60]),
            num_logprobs=rng.choice([-1, -1, 2]),
            num_prompt_logprobs=rng.choice([-1, -1, -1, 1]),
        ),
        num_samples=rng.choice([1, 1, 1, 2, 4]),
        priority=rng.choice([0, 0, 1]),
        tenant=rng.choice(["", "alice", "bob"]),
        deadline_ns=rng.choice([0, 0, 0, now_ns + rng.randrange(1, 300_000_000)]),
        **rng.choice([{}, {"trace_id": bytes(range(16)), "span_id": bytes(range(1, 9))}]),
        request_id=f"request-{handle}",
    )


def disturb(driver: Recording, rng: random.Random, num_submitted: int, *, refuses: bool) -> None:
    act = rng.random()
    handle = rng.randint(max(1, num_submitted - 30), max(1, num_submitted))
    if act < 0.010:
        driver.take(driver.scheduler.cancel(rng.choice([1, 2]), handle))
    elif act < 0.020:
        driver.take(driver.scheduler.finish_sample(rng.choice([1, 2]), handle, rng.randrange(3)))
    elif act < 0.021:
        driver.take(driver.scheduler.cancel_gateway(2))
    elif act < 0.023 and driver.plans and refuses:
        driver.run_engine(refuse=True)
    elif act < 0.025:
        driver.another_executor()


def record(num_requests: int, seed: int, *, refuses: bool = False, **options) -> Recording:
    rng = random.Random(seed)
    driver = make_recording(**options)
    num_submitted = 0
    while num_submitted < num_requests or not driver.scheduler.is_idle:
        act = rng.random()
        driver.take(driver.scheduler.expire(driver.clock.now_ns()))
        if num_submitted < num_requests and act < 0.15:
            num_submitted += 1
            submission = random_submission(num_submitted, rng, driver.clock.now_ns())
            # Some deadlines cannot be met; that is refused again in the replay.
            with contextlib.suppress(DeadlineError):
                driver.submit(submission, rng.choice([1, 2]))
        elif act < 0.5:
            driver.send_plan()
        elif act < 0.8 and driver.plans:
            driver.run_engine()
        elif driver.results:
            driver.receive()
        elif not driver.plans and driver.send_plan() is None:
            driver.clock.advance_ns(1_000_000)
        disturb(driver, rng, num_submitted, refuses=refuses)
    return driver
