"""The real scheduler and the real engine in one thread, and what each turn costs there."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.long_context.chats import Shape
from pageframe.core.clock import SystemClock
from pageframe.core.plan import StepPlan
from pageframe.core.request import Delivery, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import StepResult
from pageframe.core.trace import KvCause, KvOperation, NullTraceSink
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.retaining import SessionTimes
from pageframe.executor.model.loader import load_runner
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.options import SchedulerOptions

# A turn is over when its chat is idle: the next chat wants the room.
_IDLE_NS = 1
_TTL_NS = 3600 * 10**9


@dataclass(slots=True, kw_only=True)
class Turn:
    """One turn of one chat.

    Attributes:
        num_prompt_tokens: What it was asked, with all that went before.
        token_ids: Its answer.
        logprobs: Natural log-probability of each.
        first_token_s: Seconds from its submission to its first token.
        num_computed: Prompt tokens that were computed for it.
    """

    num_prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    first_token_s: float = 0.0
    num_computed: int = 0


class MovesCounter(NullTraceSink):
    """Counts blocks by what happened to them."""

    def __init__(self) -> None:
        self.num_blocks: dict[str, int] = {}

    def kv(
        self, operation: KvOperation, cause: KvCause, *, block_ids: Sequence[int], **_: Any
    ) -> None:
        """Count; ``PROMOTE``, for example."""
        name = operation.name
        self.num_blocks[name] = self.num_blocks.get(name, 0) + len(block_ids)


class Service:
    """Scheduler and engine in one thread, over a model of its own."""

    def __init__(
        self,
        folder: Path,
        shape: Shape,
        *,
        num_blocks: int,
        num_host_slots: int,
        has_prefix_cache: bool,
    ) -> None:
        self.moves = MovesCounter()
        self._clock = SystemClock()
        self._num_asked = 0
        runner = load_runner(
            str(folder),
            dtype="float32",
            device="cpu",
            max_num_sequences=shape.num_chats,
            max_step_tokens=shape.chunk_tokens + shape.num_chats,
        )
        self._engine = StepEngine(
            runner,
            num_blocks=num_blocks,
            block_size=shape.block_size,
            max_num_sequences=shape.num_chats,
            max_step_tokens=shape.chunk_tokens + shape.num_chats,
            max_model_len=shape.num_context_tokens,
            trace=self.moves,
            clock=self._clock,
            num_host_slots=num_host_slots,
            has_prefix_cache=has_prefix_cache,
            session_times=SessionTimes(idle_ns=_IDLE_NS, ttl_ns=_TTL_NS),
        )
        runner.warm_up()
        self._scheduler = Scheduler(
            self._engine.describe("bench"),
            SchedulerOptions(
                token_budget=shape.chunk_tokens + shape.num_chats,
                max_num_running=shape.num_chats,
                prefill_chunk_tokens=shape.chunk_tokens,
                lookahead=True,
                shares_prefixes=has_prefix_cache,
            ),
            trace=NullTraceSink(),
            clock=self._clock,
        )

    def ask(
        self, chats: Sequence[str], prompts: Sequence[list[int]], max_tokens: int
    ) -> list[Turn]:
        """One turn of each of ``chats``, all at once; returns when all are answered."""
        turns = [Turn(num_prompt_tokens=len(prompt)) for prompt in prompts]
        first_handle = self._num_asked
        self._num_asked += len(prompts)
        started_s = time.perf_counter()
        for place, (chat, prompt) in enumerate(zip(chats, prompts, strict=True)):
            self._scheduler.submit(
                Submission(
                    handle=first_handle + place,
                    request_id=f"{chat}, request {first_handle + place}",
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(
                        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, num_logprobs=0
                    ),
                    delivery=Delivery.EVERY_TOKEN,
                    session_id=chat,
                ),
                gateway_id=1,
            )
        self._run(turns, first_handle, started_s)
        assert self._engine.check_integrity() == []
        return turns

    def close(self) -> None:
        """Give back weights and pools."""
        self._engine.close()

    def _run(self, turns: list[Turn], first_handle: int, started_s: float) -> None:
        engine, scheduler, clock = self._engine, self._scheduler, self._clock
        plans: deque[StepPlan] = deque()
        place_of: dict[int, int] = {}
        while not scheduler.is_idle:
            while (plan := scheduler.plan(clock.now_ns())) is not None:
                plans.append(plan)
                for announcement in plan.announce:
                    handle = int(announcement.request_id.split()[-1])
                    place_of[announcement.sequence_id] = handle - first_handle
            due_ns = engine.desk.next_due_ns
            if due_ns and due_ns <= clock.now_ns() and engine.desk.pass_time() and not plans:
                # As the executor's thread does: no result will tell of it.
                told = StepResult(step=0, account=engine.account())
                scheduler.on_result(told, clock.now_ns())
                continue
            assert plans, "nothing is planned and nothing is done"
            result = engine.step(plans.popleft())
            assert engine.last_failure is None, engine.last_failure
            now_s = time.perf_counter() - started_s
            for sequence_id, end, start in zip(
                result.computed_ids, result.num_computed, result.first_positions, strict=True
            ):
                turn = turns[place_of[sequence_id]]
                turn.num_computed += max(0, min(end, turn.num_prompt_tokens) - start)
            for place, sequence_id in enumerate(result.sampled_ids):
                turn = turns[place_of[sequence_id]]
                turn.first_token_s = turn.first_token_s or now_s
                turn.token_ids.append(result.token_ids[place])
                turn.logprobs.append(result.logprobs[place].logprob)
            scheduler.on_result(result, clock.now_ns())
