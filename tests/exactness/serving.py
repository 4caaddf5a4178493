"""Scheduler and engine coupled in one thread: what the processes do, without the wire."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pageframe.core.clock import SystemClock
from pageframe.core.request import Completion, Delivery, Submission, TokenEvents
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import NullTraceSink
from pageframe.executor.batch import ModelRunner
from pageframe.executor.engine import StepEngine
from pageframe.scheduler.core import Scheduler

NUM_STEPS_MAX = 100_000


@dataclass
class Served:
    """Tokens and completion of each request, in order of submission."""

    token_ids: list[list[int]] = field(default_factory=list)
    completions: list[Completion | None] = field(default_factory=list)
    num_steps: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How a run is cut up."""

    num_blocks: int
    block_size: int
    prefill_chunk_tokens: int
    lookahead: bool
    max_num_sequences: int = 8
    token_budget: int = 72
    max_model_len: int = 512
    loses_each_request: bool = False
    """Whether all keys and values are lost whenever a request that never lost any has 3 tokens."""


def serve(
    runner: ModelRunner, prompts: Sequence[Sequence[int]], sampling: SamplingParams, shape: Shape
) -> Served:
    """All prompts at once; checks the pool after every step and that nothing stays behind."""
    clock = SystemClock()
    engine = StepEngine(
        runner,
        num_blocks=shape.num_blocks,
        block_size=shape.block_size,
        max_num_sequences=shape.max_num_sequences,
        max_step_tokens=shape.token_budget,
        max_model_len=min(shape.max_model_len, shape.num_blocks * shape.block_size),
        trace=NullTraceSink(),
        clock=clock,
        check_every_step=True,
    )
    scheduler = Scheduler(
        engine.describe("test"),
        token_budget=shape.token_budget,
        max_num_running=shape.max_num_sequences,
        prefill_chunk_tokens=shape.prefill_chunk_tokens,
        lookahead=shape.lookahead,
        trace=NullTraceSink(),
        clock=clock,
    )
    served = Served([[] for _ in prompts], [None for _ in prompts])
    for handle, prompt in enumerate(prompts):
        scheduler.submit(_submission(handle, prompt, sampling), gateway_id=1)
    plans: deque = deque()
    unscathed = set(range(len(prompts)))
    while not scheduler.is_idle:
        while (plan := scheduler.plan(clock.now_ns())) is not None:
            plans.append(plan)
        assert plans, f"nothing is planned and nothing is done: {scheduler.snapshot()}"
        result = engine.step(plans.popleft())
        served.num_steps += 1
        served.num_preemptions += len(result.preempted_ids)
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
    assert engine.check_integrity() == []
    account = engine.account()
    assert account.free + account.cached == account.total, account
    return served


def _has_unscathed(served: Served, unscathed: set[int]) -> bool:
    return any(
        len(served.token_ids[index]) >= 3 and served.completions[index] is None
        for index in unscathed
    )


def _submission(handle: int, prompt: Sequence[int], sampling: SamplingParams) -> Submission:
    return Submission(
        handle=handle,
        request_id=f"request-{handle}",
        prompt_token_ids=list(prompt),
        sampling=sampling,
        delivery=Delivery.EVERY_TOKEN,
    )


def _take(served: Served, events: TokenEvents) -> None:
    start = 0
    for handle, num_tokens in zip(events.handles, events.num_tokens, strict=True):
        served.token_ids[handle] += events.token_ids[start : start + num_tokens]
        start += num_tokens
    for completion in events.completions:
        assert served.completions[completion.handle] is None, "a second completion"
        served.completions[completion.handle] = completion
