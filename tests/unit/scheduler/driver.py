"""Drives a scheduler against an engine as the service does, one message at a time.

    scheduler ──plans──▶ wire ──▶ engine ──results──▶ wire back ──▶ scheduler
                cancels overtake plans, as they do in the executor

Every event is checked as it comes: tokens in order, each once, none after the completion.
"""

from collections import deque
from dataclasses import dataclass, field, replace

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.plan import Recovery, StepPlan
from pageframe.core.replica import ReplicaFacts, TenantQuota
from pageframe.core.request import Completion, Delivery, Submission, TokenEvents
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, StepResult
from pageframe.core.trace import NullTraceSink, TraceSink
from pageframe.core.units import ceil_div
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.options import SchedulerOptions
from pageframe.scheduler.policies.guard import PolicyFault
from pageframe.scheduler.sequence import SequenceState
from pageframe.testing.fake_engine import FakeEngine, make_facts
from pageframe.testing.fake_sequence import next_token

Sample = tuple[int, int, int]
"""Gateway, handle, sample index."""

GATEWAY = 1


def make_submission(
    handle: int,
    prompt: list[int] | int = 4,
    *,
    max_tokens: int = 3,
    sampling: SamplingParams | None = None,
    **fields,
) -> Submission:
    """A greedy request; a number as ``prompt`` is a length."""
    if isinstance(prompt, int):
        prompt = [1 + (handle * 7 + index) % 900 for index in range(prompt)]
    fields.setdefault("request_id", f"request-{handle}")
    return Submission(
        handle=handle,
        prompt_token_ids=prompt,
        sampling=sampling or SamplingParams(temperature=0.0, max_tokens=max_tokens),
        **fields,
    )


def expected_output(submission: Submission, facts: ReplicaFacts) -> list[int]:
    """What the fake engine samples for a request when nothing disturbs it."""
    token_ids = list(submission.prompt_token_ids)
    sampling = submission.sampling
    output: list[int] = []
    while len(output) < sampling.max_tokens:
        output.append(next_token(token_ids + output, facts.vocab_size))
        if output[-1] in sampling.stop_token_ids and len(output) >= sampling.min_tokens:
            break
    return output


@dataclass
class Driver:
    """A scheduler, an engine and the wire between them."""

    facts: ReplicaFacts = field(default_factory=make_facts)
    token_budget: int = 16
    max_num_running: int = 8
    prefill_chunk_tokens: int = 0
    target_itl_ns: int = 0
    num_draft_tokens: int = 0
    lookahead: bool = True
    trace: TraceSink = field(default_factory=NullTraceSink)
    engine: FakeEngine | None = None
    max_queued_requests: int = 1000
    max_queued_tokens: int = 100_000
    recovery: Recovery | str = Recovery.RECOMPUTE
    victim_policy: str = "youngest"
    more_policies: dict[str, str] = field(default_factory=dict)
    shadow_policies: dict[str, str] = field(default_factory=dict)
    shares_prefixes: bool = True
    quotas: tuple[TenantQuota, ...] = ()
    tenant_weights: dict[str, float] = field(default_factory=dict)
    priority_ageing_ns: int = 0

    def __post_init__(self) -> None:
        self.clock = ManualClock(1_000_000)
        self.engine = self.engine or FakeEngine(self.facts)
        self.faults: list[PolicyFault] = []
        self.scheduler = Scheduler(
            self.facts,
            SchedulerOptions(
                token_budget=self.token_budget,
                max_num_running=self.max_num_running,
                prefill_chunk_tokens=self.prefill_chunk_tokens,
                target_itl_ns=self.target_itl_ns,
                num_draft_tokens=self.num_draft_tokens,
                lookahead=self.lookahead,
                max_queued_requests=self.max_queued_requests,
                max_queued_tokens=self.max_queued_tokens,
                tenant_weights=self.tenant_weights,
                priority_ageing_ns=self.priority_ageing_ns,
                policies=self.policies(),
                shadow_policies=self.shadow_policies,
                on_policy_fault=self.faults.append,
                shares_prefixes=self.shares_prefixes,
                quotas=self.quotas,
            ),
            trace=self.trace,
            clock=self.clock,
        )
        self.plans: deque[StepPlan] = deque()
        self.results: deque[StepResult] = deque()
        self.sent: list[StepPlan] = []
        self.tokens: dict[Sample, list[int]] = {}
        self.completions: dict[Sample, Completion] = {}
        self.messages: list[TokenEvents] = []

    def policies(self) -> dict[str, str]:
        recovery = self.recovery
        name = recovery.name.lower() if isinstance(recovery, Recovery) else recovery
        return {"victim": self.victim_policy, "recovery": name, **self.more_policies}

    def submit(
        self, submission: Submission, gateway_id: int = GATEWAY, *, is_steered: bool = False
    ) -> None:
        self.scheduler.submit(submission, gateway_id)
        request = self.scheduler._roster.requests.get((gateway_id, submission.handle))
        for sequence in request.sequences if is_steered and request else ():
            sequence.is_steered = True
        for sample_index in range(submission.num_samples):
            resume = submission.resume_token_ids
            key = (gateway_id, submission.handle, sample_index)
            self.tokens[key] = list(resume[sample_index]) if resume else []

    def send_cancels(self) -> None:
        cancels = self.scheduler.take_cancels()
        if cancels:
            self.results.append(self.engine.cancel(cancels))

    def send_plan(self) -> StepPlan | None:
        self.send_cancels()
        plan = self.scheduler.plan(self.clock.now_ns())
        if plan is not None:
            self.plans.append(plan)
            self.sent.append(plan)
        return plan

    def wait_until_due(self) -> None:
        """Let the time pass for which the next plan is held back, if it is."""
        now_ns = self.clock.now_ns()
        self.clock.advance_ns(max(0, self.scheduler.plan_due_ns(now_ns) - now_ns))

    def run_engine(self, *, refuse: bool = False) -> None:
        plan = self.plans.popleft()
        if refuse:
            plan = replace(plan, builds_on=plan.builds_on + 1_000_000)
        self.engine.now_ns = max(self.engine.now_ns, self.clock.now_ns())
        self.results.append(self.engine.step(plan))
        self.clock.advance_ns(max(0, self.engine.now_ns - self.clock.now_ns()))

    def receive(self) -> StepResult:
        result = self.results.popleft()
        self.take(self.scheduler.on_result(result, self.clock.now_ns()))
        return result

    def step(self) -> StepResult | None:
        """Send what may be sent, run one plan, and take in everything that comes back."""
        result = None
        while self.send_plan() is not None:
            pass
        while self.results:
            result = self.receive()
        if self.plans:
            self.run_engine()
            result = self.receive()
        return result

    def run(self, num_steps_max: int = 10_000) -> int:
        """Run until nothing is left; returns how many plans that took."""
        for num_steps in range(num_steps_max):
            self.take(self.scheduler.expire(self.clock.now_ns()))
            while self.send_plan() is not None:
                pass
            if self.results:
                self.receive()
            elif self.plans:
                self.run_engine()
            else:
                assert self.scheduler.is_idle, self.scheduler.snapshot()
                return num_steps
        raise AssertionError(f"not done: {self.scheduler.snapshot()}")

    def lose_executor(self) -> None:
        """The executor dies with all that is on the wire."""
        self.plans.clear()
        self.results.clear()
        self.take(self.scheduler.on_executor_lost(self.clock.now_ns()))

    def start_executor(self) -> None:
        """A new one comes."""
        self.engine = FakeEngine(
            self.facts,
            num_hit_tokens=self.engine.num_hit_tokens,
            num_right=self.engine.num_right,
            shares_prefixes=self.engine.shares_prefixes,
            ceilings=self.engine.ceilings,
        )
        self.take(
            self.scheduler.on_executor_ready(self.facts, self.engine.account(), self.clock.now_ns())
        )

    def take(self, events: list[tuple[int, TokenEvents]]) -> None:
        for gateway_id, message in events:
            assert not message.is_empty
            self.messages.append(message)
            start = 0
            for handle, sample_index, num_tokens in zip(
                message.handles, message.sample_indices, message.num_tokens, strict=True
            ):
                key = (gateway_id, handle, sample_index)
                assert key not in self.completions, f"tokens of {key} after its completion"
                self.tokens[key] += message.token_ids[start : start + num_tokens]
                start += num_tokens
            assert start == len(message.token_ids)
            for completion in message.completions:
                key = (gateway_id, completion.handle, completion.sample_index)
                assert key not in self.completions, f"{key} completed twice"
                self.completions[key] = completion
                assert completion.num_output_tokens == len(self.tokens[key])
                spent_ns = completion.compute_ns + sum(completion.stall_ns.values())
                assert spent_ns <= completion.end_ns - completion.submit_ns, "time counted twice"
                if completion.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                    assert spent_ns == completion.end_ns - completion.submit_ns, "unexplained time"

    def output(self, handle: int, sample_index: int = 0, gateway_id: int = GATEWAY) -> list[int]:
        return self.tokens[gateway_id, handle, sample_index]

    def completion(
        self, handle: int, sample_index: int = 0, gateway_id: int = GATEWAY
    ) -> Completion:
        return self.completions[gateway_id, handle, sample_index]

    def reason(self, handle: int, sample_index: int = 0) -> FinishReason:
        return self.completion(handle, sample_index).finish_reason


def assert_scheduler_empty(driver: Driver) -> None:
    """After any scenario nothing may remain, neither here nor in the engine."""
    scheduler = driver.scheduler
    assert scheduler.is_idle
    assert scheduler.take_cancels() == []
    assert scheduler.plan(driver.clock.now_ns()) is None
    assert scheduler.next_deadline_ns == 0
    roster = scheduler._roster
    places = (roster.sequences, roster.requests, roster.names, roster.running, roster.line)
    assert [len(place) for place in (*places, roster.prefills)] == [0] * 6
    assert (len(roster.decodes), len(roster.steered)) == (0, 0)
    assert not any(roster.decodes._num_by_phase)
    assert not any(roster.decodes._wheel)
    assert not roster.decodes._num_ending
    assert not roster.decodes._num_copies
    assert (roster.parents, len(roster.prefixes)) == ({}, 0)
    assert (roster.backlog.num_requests, roster.backlog.num_tokens) == (0, 0)
    assert len(scheduler._deadlines) == 0
    assert roster.num_blocks_final == 0
    assert [s for s in roster.shares.all if s.num_living or s.num_running or s.num_waiting] == []
    assert driver.engine.sequences == {}
    assert driver.engine.num_free == driver.facts.num_blocks


def assert_scheduler_consistent(scheduler: Scheduler) -> None:
    """Recompute from nothing what the scheduler keeps current bit by bit."""
    roster = scheduler._roster
    living = roster.sequences.values()
    by_state = {
        state: {s.sequence_id for s in living if s.state is state} for state in SequenceState
    }
    assert by_state[SequenceState.ENDED] == set()
    in_line = by_state[SequenceState.WAITING] | by_state[SequenceState.PREEMPTED]
    assert {s.sequence_id for s in roster.line} == in_line
    assert all(s in roster.line for s in roster.line)
    assert len(roster.line) == len(in_line)
    assert roster.line.num_preempted == len(by_state[SequenceState.PREEMPTED])
    assert_shares_consistent(scheduler)
    siblings = {s.sequence_id for r in roster.requests.values() for s in r.siblings}
    assert siblings == by_state[SequenceState.SIBLING]
    parents = {
        r.sequences[0].sequence_id: r
        for r in roster.requests.values()
        if r.siblings and r.sequences[0].sequence_id in roster.running
    }
    assert roster.parents == parents
    assert all(request.may_fork for request in roster.requests.values() if request.siblings)
    running = by_state[SequenceState.ADMITTING] | by_state[SequenceState.RUNNING]
    assert set(roster.running) == running
    decodes = {s.sequence_id for s in living if s in roster.decodes}
    prefills = {s.sequence_id for s in roster.prefills}
    steered = {s.sequence_id for s in roster.steered}
    assert not decodes & prefills
    assert not (decodes | prefills) & steered
    assert decodes | prefills | steered == running
    assert all(roster.sequences[sequence_id].is_steered for sequence_id in steered)
    waiting = [s for s in living if s.state in (SequenceState.WAITING, SequenceState.SIBLING)]
    assert roster.backlog.num_tokens == sum(s.num_tokens for s in waiting)
    assert roster.backlog.num_requests == len({id(s.submission) for s in waiting})
    computing = [s for others in roster.prefixes._computing.values() for s in others]
    assert len(computing) == len({s.sequence_id for s in computing})
    assert all(s.sequence_id in running and not s.is_caught_up for s in computing)
    assert len(roster.running) <= roster.capacity.max_num_running
    in_flight = dict.fromkeys(roster.sequences, 0)
    for flight in scheduler._flights._flights:
        for chunk in flight.chunks:
            if chunk.is_current and chunk.sequence.sequence_id in in_flight:
                in_flight[chunk.sequence.sequence_id] += chunk.num_tokens + chunk.num_cached
    for sequence in living:
        assert sequence.num_tokens_in_flight == in_flight[sequence.sequence_id], sequence
        if sequence.sequence_id in prefills:
            assert sequence.num_uncomputed > 1


def assert_shares_consistent(scheduler: Scheduler) -> None:
    """Each tenant's account, recomputed over all that lives."""
    roster = scheduler._roster
    shares = {share.tenant: share for share in roster.shares.all}
    assert roster.shares._weight_present == pytest.approx(sum(s.weight for s in shares.values()))
    weight_waiting = sum(s.weight for s in shares.values() if s.num_waiting)
    assert roster.shares._weight_waiting == pytest.approx(weight_waiting)
    assert roster.num_blocks_final == sum(
        roster.capacity.num_blocks_peak(s.num_positions_max) for s in roster.running.values()
    )
    for tenant, share in shares.items():
        living = [s for s in roster.sequences.values() if s.submission.tenant == tenant]
        running = [s for s in living if s.sequence_id in roster.running]
        assert all(s.share is share for s in living)
        assert share.num_living == len(living)
        assert share.num_running == len(running)
        assert share.num_waiting == len([s for s in living if s in roster.line])
        assert share.num_tokens_held == sum(s.num_tokens for s in running)
        assert all(not s.num_tokens_charged for s in living if s.sequence_id not in roster.running)


def num_blocks_of(num_tokens: int, facts: ReplicaFacts) -> int:
    return ceil_div(num_tokens, facts.block_size)


def deliver(kind: Delivery, num_tokens: int = 8) -> dict:
    return {"delivery": kind, "num_tokens_per_event_max": num_tokens}
