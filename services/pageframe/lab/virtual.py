"""The real scheduler and the real KV memory in virtual time.

    arrivals ─▶ Scheduler ─plan─▶ StepEngine ─▶ VirtualRunner (advances the clock)
                    ▲                 │
                    └──── result ─────┘

Nothing here decides anything: requests are handed in when the clock says so, plans go to the
engine and results back. What a run keeps of a step are columns; who waited how long between which
tokens is worked out of them afterwards, so that a token costs no Python.
"""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pageframe.core.clock import ManualClock
from pageframe.core.errors import InternalError, PageframeError
from pageframe.core.plan import StepPlan
from pageframe.core.request import Completion, Delivery, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, StepResult
from pageframe.core.trace import NullTraceSink
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.executor.batch import StepBatch
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.eviction import load_eviction_policy
from pageframe.lab.simulate_arrivals import Arrival
from pageframe.lab.simulate_cost import DeviceCost
from pageframe.lab.virtual_runner import VOCAB_SIZE, VirtualRunner
from pageframe.scheduler.core import Events, Scheduler
from pageframe.scheduler.options import SchedulerOptions

_GATEWAY = 1
_START_NS = 1
# Tokens of prompts: the first says whose prompt it is, so no two share a block by chance.
_FILLER = 7
_PREFIX_BASE = 1 << 28
_PROGRESS_EVERY_STEPS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualConfig:
    """What is simulated.

    Attributes:
        cost: What steps cost.
        options: Of the scheduler.
        num_blocks: Blocks of the pool.
        block_size: Tokens per block.
        max_model_len: Most tokens of one sequence.
        num_host_slots: Blocks of the host tier.
        eviction_policy: Which cached block goes first.
    """

    cost: DeviceCost
    options: SchedulerOptions
    num_blocks: int
    block_size: int = 16
    max_model_len: int = 32_768
    num_host_slots: int = 0
    eviction_policy: str = "lru"


@dataclass(slots=True)
class StepColumns:
    """What is kept of each step; parallel arrays.

    Attributes:
        end_ns: When its tokens were known.
        num_tokens: Tokens that it sampled.
        num_computed: Tokens that it computed.
        num_running: Sequences in it.
        num_living: Sequences that had come and not ended, running or not.
        num_held: Blocks that were held after it.
        sampled_ids: The sequences that got a token, of all steps one after the other.
    """

    end_ns: "array[int]" = field(default_factory=lambda: array("q"))
    num_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    num_computed: "array[int]" = field(default_factory=lambda: array("q"))
    num_running: "array[int]" = field(default_factory=lambda: array("q"))
    num_living: "array[int]" = field(default_factory=lambda: array("q"))
    num_held: "array[int]" = field(default_factory=lambda: array("q"))
    sampled_ids: "array[int]" = field(default_factory=lambda: array("q"))


@dataclass(slots=True, kw_only=True)
class VirtualRun:
    """What came of a workload.

    Attributes:
        arrivals: The requests, in order of time; other arrays speak of them by place.
        steps: See ``StepColumns``; times since the beginning.
        request_of: Place of the request by sequence id.
        completions: One for each sample that ended, with the place of its request.
        end_ns: When each of those ended.
        refused: Requests that were refused at once, by reason.
        num_preemptions: How often a sequence lost blocks.
        num_blocks: Of the pool.
    """

    arrivals: Sequence[Arrival]
    num_blocks: int
    steps: StepColumns = field(default_factory=StepColumns)
    request_of: dict[int, int] = field(default_factory=dict)
    completions: list[tuple[int, Completion]] = field(default_factory=list)
    end_ns: "array[int]" = field(default_factory=lambda: array("q"))
    refused: Counter[str] = field(default_factory=Counter)
    num_preemptions: int = 0

    @property
    def duration_s(self) -> float:
        """Until the last token, seconds."""
        return self.steps.end_ns[-1] / NANOSECONDS_PER_SECOND if self.steps.end_ns else 0.0

    def token_times(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sequence id and time of every token, by sequence, then time; int64 [N] each."""
        ids = np.frombuffer(self.steps.sampled_ids, dtype=np.int64)
        ends = np.frombuffer(self.steps.end_ns, dtype=np.int64)
        times = np.repeat(ends, np.frombuffer(self.steps.num_tokens, dtype=np.int64))
        # Tokens stand in order of time, so a stable sort by sequence is all it takes.
        order = np.argsort(ids, kind="stable")
        return ids[order], times[order]


class VirtualServer:
    """Serves one workload; use it once.

    Args:
        config: What is simulated.
    """

    def __init__(self, config: VirtualConfig) -> None:
        self._config = config
        self._clock = ManualClock(_START_NS)
        runner = VirtualRunner(
            config.cost,
            self._clock,
            max_model_len=config.max_model_len,
            on_execute=self._note_batch,
        )
        options = config.options
        self._engine = StepEngine(
            runner,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_num_sequences=options.max_num_running,
            max_step_tokens=max(options.token_budget, options.max_num_running),
            max_model_len=config.max_model_len,
            trace=NullTraceSink(),
            clock=self._clock,
            num_host_slots=config.num_host_slots,
            has_prefix_cache=options.shares_prefixes,
            eviction=load_eviction_policy(config.eviction_policy),
        )
        self._engine.desk.replace_quotas(options.quotas)
        self._scheduler = Scheduler(
            self._engine.describe("virtual"), options, trace=NullTraceSink(), clock=self._clock
        )
        self._plans: deque[StepPlan] = deque()
        self._num_living = 0
        self._num_in_batch = 0
        self._num_computed = 0

    def serve(
        self,
        arrivals: Sequence[Arrival],
        *,
        on_progress: Callable[[float], None] | None = None,
    ) -> VirtualRun:
        """Run until every request has ended.

        Args:
            arrivals: In order of time.
            on_progress: Told now and then which share of the requests has ended.

        Raises:
            InternalError: SIMULATION_STUCK, with how many live; a policy lets nobody run.
        """
        run = VirtualRun(arrivals=arrivals, num_blocks=self._config.num_blocks)
        times = [_START_NS + round(it.arrival_s * NANOSECONDS_PER_SECOND) for it in arrivals]
        num_come, num_samples = 0, sum(arrival.num_samples for arrival in arrivals)
        clock, scheduler, engine, plans = self._clock, self._scheduler, self._engine, self._plans
        while num_come < len(times) or self._num_living:
            now_ns = clock.now_ns()
            num_come = self._submit_due(run, times, num_come, now_ns)
            if 0 < scheduler.next_deadline_ns <= now_ns:
                self._take_events(run, scheduler.expire(now_ns))
            self._send(run)
            if plans:
                plan_due_ns = scheduler.plan_due_ns(now_ns)
                result = engine.step(plans.popleft())
                if 0 < plan_due_ns <= clock.now_ns():
                    # While the step ran, whoever had come by then was planned for.
                    num_come = self._submit_due(run, times, num_come, plan_due_ns)
                    self._plan(run)
                self._take_result(run, result)
            elif not self._wait(run, times[num_come] if num_come < len(times) else 0):
                raise InternalError(
                    "SIMULATION_STUCK",
                    f"{self._num_living} sequences live and nothing is planned",
                    num_living=self._num_living,
                )
            if on_progress is not None and len(run.steps.end_ns) % _PROGRESS_EVERY_STEPS == 0:
                on_progress(len(run.completions) / num_samples)
        return run

    def _submit_due(self, run: VirtualRun, times: Sequence[int], place: int, now_ns: int) -> int:
        """Hand in who has come, from ``place`` on; the place of the next to come."""
        while place < len(times) and times[place] <= now_ns:
            self._submit(run, place)
            place += 1
        return place

    def _submit(self, run: VirtualRun, place: int) -> None:
        arrival = run.arrivals[place]
        now_ns = self._clock.now_ns()
        arrival_ns = _START_NS + round(arrival.arrival_s * NANOSECONDS_PER_SECOND)
        deadline_ns = round(arrival.deadline_s * NANOSECONDS_PER_SECOND)
        submission = Submission(
            handle=place + 1,
            request_id=str(place),
            prompt_token_ids=_prompt(arrival, place),
            num_samples=arrival.num_samples,
            sampling=SamplingParams(
                max_tokens=arrival.num_output_tokens, ignore_eos=True, temperature=1.0, seed=place
            ),
            delivery=Delivery.FINAL,
            priority=arrival.priority,
            tenant=arrival.tenant,
            cache_salt=arrival.tenant.encode(),
            deadline_ns=arrival_ns + deadline_ns if deadline_ns else 0,
            arrival_ns=arrival_ns,
        )
        try:
            self._scheduler.submit(submission, _GATEWAY)
        except PageframeError as error:
            run.refused[error.reason] += 1
            return
        self._num_living += arrival.num_samples
        self._take_events(run, self._scheduler.expire(now_ns))

    def _send(self, run: VirtualRun) -> None:
        """What the scheduler has to say: cancels first, then plans."""
        cancels = self._scheduler.take_cancels()
        if cancels:
            self._take_result(run, self._engine.cancel(cancels))
        self._plan(run)

    def _plan(self, run: VirtualRun) -> None:
        while (plan := self._scheduler.plan(self._clock.now_ns())) is not None:
            for announcement in plan.announce:
                run.request_of[announcement.sequence_id] = int(announcement.request_id)
            for fork in plan.forks:
                place = run.request_of[fork.parent_id]
                run.request_of.update(dict.fromkeys(fork.child_ids, place))
            self._plans.append(plan)

    def _wait(self, run: VirtualRun, arrival_ns: int) -> bool:
        """Let time pass until something happens; whether there is anything to wait for."""
        moments = [ns for ns in (arrival_ns, self._scheduler.next_deadline_ns) if ns]
        if not moments:
            return False
        self._clock.advance_ns(max(0, min(moments) - self._clock.now_ns()))
        self._take_events(run, self._scheduler.expire(self._clock.now_ns()))
        return True

    def _take_result(self, run: VirtualRun, result: StepResult) -> None:
        now_ns = self._clock.now_ns()
        if result.step and not result.refusal:
            steps = run.steps
            steps.end_ns.append(now_ns - _START_NS)
            steps.num_tokens.append(len(result.sampled_ids))
            steps.num_computed.append(self._num_computed)
            steps.num_running.append(self._num_in_batch)
            steps.num_living.append(self._num_living)
            steps.num_held.append(result.account.held)
            steps.sampled_ids.extend(result.sampled_ids)
            run.num_preemptions += len(result.preempted_ids)
            self._num_computed = self._num_in_batch = 0
        self._take_events(run, self._scheduler.on_result(result, now_ns))

    def _take_events(self, run: VirtualRun, events: Events) -> None:
        for _, message in events:
            for completion in message.completions:
                self._num_living -= 1
                run.completions.append((completion.handle - 1, completion))
                run.end_ns.append(self._clock.now_ns() - _START_NS)

    def _note_batch(self, batch: StepBatch) -> None:
        self._num_in_batch = len(batch.rows)
        self._num_computed = len(batch.token_ids)


def has_succeeded(completion: Completion) -> bool:
    """Whether a sample has all its tokens."""
    return completion.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)


def _prompt(arrival: Arrival, place: int) -> list[int]:
    """Token ids that no other prompt begins with, but for what is to be shared."""
    if arrival.prompt_token_ids:
        return [token_id % VOCAB_SIZE for token_id in arrival.prompt_token_ids]
    num_shared = arrival.num_prefix_tokens if arrival.prefix_id else 0
    token_ids = [_FILLER] * arrival.num_prompt_tokens
    if num_shared:
        token_ids[0] = _PREFIX_BASE + _number_of(arrival.prefix_id)
    if num_shared < arrival.num_prompt_tokens:
        token_ids[num_shared] = 8 + place
    return token_ids


def _number_of(name: str) -> int:
    """The same number for the same name in every process; hashes of texts differ."""
    number = 0
    for byte in name.encode():
        number = (number * 257 + byte + 1) % (VOCAB_SIZE // 4)
    return number
