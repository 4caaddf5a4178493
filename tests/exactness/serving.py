"""Scheduler and engine coupled in one thread: what the processes do, without the wire."""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pageframe.core.clock import SystemClock
from pageframe.core.plan import Recovery
from pageframe.core.request import Completion, Delivery, Submission, TokenEvents
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import TokenLogprobs
from pageframe.core.trace import NullTraceSink
from pageframe.executor.batch import ModelRunner
from pageframe.executor.drafting import Drafter
from pageframe.executor.engine import StepEngine
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.options import SchedulerOptions
from unit.memory.kv_records import RecordingSink

NUM_STEPS_MAX = 100_000


@dataclass
class Served:
    """Tokens and completion of each sample, by place of the request and sample index.

    Attributes:
        samples: Tokens.
        completions: How each ended.
        num_steps: Steps of the engine.
        num_preemptions: Victims taken.
        num_accepted: Draft tokens kept.
        logprobs: Of the tokens of the first sample of each request, where asked for.
        seen: How often each operation and each cause stands in the trace, by name.
    """

    samples: list[list[list[int]]]
    completions: list[list[Completion | None]]
    num_steps: int = 0
    num_preemptions: int = 0
    num_accepted: int = 0
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)

    @property
    def token_ids(self) -> list[list[int]]:
        """Of the first sample of each request."""
        return [samples[0] for samples in self.samples]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a run is cut up. Blocks and slots are counted for each group of layers."""

    num_blocks: int
    block_size: int
    prefill_chunk_tokens: int
    lookahead: bool
    max_num_sequences: int = 8
    token_budget: int = 72
    max_model_len: int = 512
    num_samples: int = 1
    num_host_slots: int = 0
    num_draft_tokens: int = 0
    recovery: Recovery = Recovery.RECOMPUTE
    loses_each_request: bool = False
    """Whether all keys and values are lost whenever a request that never lost any has 3 tokens."""


def serve(
    runner: ModelRunner,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
    shape: Shape,
    drafter: Drafter | None = None,
) -> Served:
    """All prompts at once; checks the pool after every step and that nothing stays behind."""
    wishes = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
    clock, sink = SystemClock(), RecordingSink()
    engine = _engine(runner, shape, sink, clock, drafter)
    scheduler = Scheduler(
        engine.describe("test"),
        SchedulerOptions(
            token_budget=shape.token_budget,
            max_num_running=shape.max_num_sequences,
            prefill_chunk_tokens=shape.prefill_chunk_tokens,
            num_draft_tokens=shape.num_draft_tokens,
            lookahead=shape.lookahead,
            policies={"recovery": shape.recovery.name.lower()},
        ),
        trace=NullTraceSink(),
        clock=clock,
    )
    samples = range(shape.num_samples)
    served = Served(
        [[[] for _ in samples] for _ in prompts], [[None for _ in samples] for _ in prompts]
    )
    for handle, (prompt, wish) in enumerate(zip(prompts, wishes, strict=True)):
        scheduler.submit(_submission(handle, prompt, wish, shape), gateway_id=1)
    plans: deque = deque()
    unscathed = set(range(len(prompts)))
    while not scheduler.is_idle:
        while (plan := scheduler.plan(clock.now_ns())) is not None:
            plans.append(plan)
        assert plans, f"nothing is planned and nothing is done: {scheduler.snapshot()}"
        result = engine.step(plans.popleft())
        served.num_steps += 1
        served.num_preemptions += len(result.preempted_ids)
        served.num_accepted += sum(result.num_accepted)
        assert served.num_steps < NUM_STEPS_MAX, "no end in sight"
        for _, events in scheduler.on_result(result, clock.now_ns()):
            _take(served, events)
        if shape.loses_each_request and _has_unscathed(served, unscathed):
            unscathed -= {index for index, ids in enumerate(served.token_ids) if ids}
            plans.clear()
            engine.reset()
            scheduler.on_executor_lost(clock.now_ns())
            scheduler.on_executor_ready(engine.describe("test"), engine.account(), clock.now_ns())
    assert not (shape.loses_each_request and unscathed), f"never lost a block: {unscathed}"
    _check_at_rest(engine)
    for record in sink.records:
        served.seen.update([record.operation.name, f"because {record.cause.name}"])
    return served


def _engine(
    runner: ModelRunner,
    shape: Shape,
    sink: RecordingSink,
    clock: SystemClock,
    drafter: Drafter | None,
) -> StepEngine:
    return StepEngine(
        runner,
        num_blocks=shape.num_blocks * runner.facts.num_kv_groups,
        block_size=shape.block_size,
        max_num_sequences=shape.max_num_sequences,
        max_step_tokens=shape.token_budget,
        max_model_len=min(shape.max_model_len, shape.num_blocks * shape.block_size),
        num_host_slots=shape.num_host_slots * runner.facts.num_kv_groups,
        trace=sink,
        clock=clock,
        check_every_step=True,
        drafter=drafter,
    )


def _check_at_rest(engine: StepEngine) -> None:
    assert engine.last_failure is None
    assert engine.check_integrity() == []
    account = engine.account()
    assert account.free + account.cached == account.total, account


def _has_unscathed(served: Served, unscathed: set[int]) -> bool:
    return any(
        len(served.token_ids[index]) >= 3 and served.completions[index][0] is None
        for index in unscathed
    )


def _submission(
    handle: int, prompt: Sequence[int], sampling: SamplingParams, shape: Shape
) -> Submission:
    return Submission(
        handle=handle,
        request_id=f"request-{handle}",
        prompt_token_ids=list(prompt),
        sampling=sampling,
        num_samples=shape.num_samples,
        delivery=Delivery.EVERY_TOKEN,
    )


def _take(served: Served, events: TokenEvents) -> None:
    start = 0
    for handle, sample_index, num_tokens in zip(
        events.handles, events.sample_indices, events.num_tokens, strict=True
    ):
        tokens = events.token_ids[start : start + num_tokens]
        served.samples[handle][sample_index] += tokens
        if sample_index == 0:
            places = range(start, start + num_tokens)
            entries = [events.logprobs[index] for index in places if index in events.logprobs]
            served.logprobs.setdefault(handle, []).extend(entries)
        start += num_tokens
    for completion in events.completions:
        completions = served.completions[completion.handle]
        assert completions[completion.sample_index] is None, "a second completion"
        completions[completion.sample_index] = completion
