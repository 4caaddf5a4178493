"""The scheduler's pure core: requests in, plans out, results in, token events out.

``Scheduler`` conducts; each part guards one thing:

    request      what is malformed                queues       order and bounds of waiting
    roster       who stands where                 decode       who takes a token in every step
    flights      plans not yet answered           budget       what is left of one step
    planner      the next plan                    settlement   what a result means
    admission    who comes in                     preemption   who gives way
    prefix_wait  who waits to share               forks        samples of one prompt
    tenants      what quotas mean                 fitting      what could never be served
    endings      the last of a sequence           delivery     tokens on their way out
    stalls       clocks of waiting                tracing      spans

No part awaits or asks the system for the time, so all of it runs unchanged in a simulator.
Whoever drives it sends cancels before plans, and plans and results one at a time in order.
"""

from array import array
from dataclasses import replace

from pageframe.core.clock import Clock
from pageframe.core.errors import AlreadyExistsError, UnavailableError
from pageframe.core.limits import LIMITS
from pageframe.core.plan import Recovery, StepPlan
from pageframe.core.replica import PoolAccount, ReplicaFacts
from pageframe.core.request import StallCause, Submission, TokenEvents
from pageframe.core.step import FinishReason, StepResult
from pageframe.core.trace import TraceSink
from pageframe.scheduler.admission import Admission
from pageframe.scheduler.budget import Capacity
from pageframe.scheduler.delivery import Outboxes
from pageframe.scheduler.endings import Endings
from pageframe.scheduler.fitting import Fitting
from pageframe.scheduler.flights import Flights
from pageframe.scheduler.forks import Forks
from pageframe.scheduler.options import SchedulerOptions
from pageframe.scheduler.planner import Planner
from pageframe.scheduler.preemption import Preemption
from pageframe.scheduler.prefix_wait import PrefixWait
from pageframe.scheduler.queues import Backlog, Deadlines
from pageframe.scheduler.request import Request, check_submission, finished_already
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Sequence, SequenceState
from pageframe.scheduler.settlement import Settlement
from pageframe.scheduler.snapshot import SchedulerSnapshot, take_snapshot
from pageframe.scheduler.stalls import StallMeter
from pageframe.scheduler.tenants import Tenants
from pageframe.scheduler.tracing import SchedulerTracer

Events = list[tuple[int, TokenEvents]]
"""Token events by gateway id."""


class Scheduler:
    """Decides who runs on one model replica.

    Args:
        facts: What the executor serves. It counts as connected, with an empty pool.
        options: Bounds and choices.
        trace: Where spans go.
        clock: Source of time.
    """

    def __init__(
        self,
        facts: ReplicaFacts,
        options: SchedulerOptions,
        *,
        trace: TraceSink,
        clock: Clock,
    ) -> None:
        self._facts = facts
        self._options = options
        self._clock = clock
        self._next_sequence_id = options.first_sequence_id
        self._num_submitted = 0
        self._is_ready = True
        self._is_draining = False
        self._outboxes = Outboxes()
        self._deadlines = Deadlines()
        self._roster = Roster(
            self._capacity_of(facts),
            Backlog(options.max_queued_requests, options.max_queued_tokens),
        )
        self._flights = Flights(
            LIMITS.num_steps_in_flight_max if options.lookahead else 1, _empty_pool(facts)
        )
        self._tracer = tracer = SchedulerTracer(trace, seed=clock.now_ns())
        self._tenants = Tenants(self._roster, options.quotas)
        self._preemption = Preemption(self._roster, self._flights, self._tenants)
        self._endings = Endings(self._roster, self._deadlines, tracer)
        self._fitting = Fitting(self._roster, self._tenants, self._endings)
        forks = Forks(self._roster)
        prefix_wait = PrefixWait(self._roster, is_enabled=options.shares_prefixes)
        self._planner = Planner(
            self._roster,
            self._flights,
            self._preemption,
            Admission(self._roster, self._preemption, prefix_wait, self._tenants, tracer),
            forks,
            self._tenants,
        )
        self._settlement = Settlement(
            self._roster,
            self._flights,
            self._preemption,
            forks,
            self._tenants,
            self._endings,
            tracer,
        )
        self._preemption.forget(self._recovery_with(facts))

    # Requests.

    def submit(self, submission: Submission, gateway_id: int) -> None:
        """Take in a request; its events go to ``gateway_id``.

        The lists of ``submission`` are kept and must not be changed afterwards.

        Raises:
            UnavailableError: DRAINING.
            InvalidRequestError: malformed.
            OutOfRangeError: this replica could never serve it.
            DeadlineError: DEADLINE_PASSED.
            AlreadyExistsError: DUPLICATE_REQUEST or DUPLICATE_HANDLE.
            ResourceExhaustedError: QUEUE_FULL.
        """
        now_ns = self._clock.now_ns()
        roster = self._roster
        if self._is_draining:
            raise UnavailableError("DRAINING", "this scheduler is shutting down; try another")
        check_submission(submission, self._facts, now_ns=now_ns)
        self._fitting.check(submission, self._facts)
        self._check_names(submission, gateway_id)
        num_tokens = submission.num_samples * len(submission.prompt_token_ids)
        roster.backlog.check_room(num_tokens + sum(map(len, submission.resume_token_ids)))
        self._num_submitted += 1
        outbox = self._outboxes.of(gateway_id)
        outbox.num_requests += 1
        request = Request(
            serial=self._num_submitted,
            submission=submission,
            gateway_id=gateway_id,
            outbox=outbox,
        )
        roster.requests[gateway_id, submission.handle] = request
        roster.names[submission.request_id] = request
        self._deadlines.add(request)
        for sample_index in range(submission.num_samples):
            self._add_sequence(request, sample_index, now_ns)
        self._end_finished(request, now_ns)

    def cancel(
        self, gateway_id: int, handle: int, reason: FinishReason = FinishReason.CANCELLED
    ) -> Events:
        """Take a request back in whatever state; nothing happens if it is over already.

        Completions come at once for what the executor does not know, else with its release.
        """
        request = self._roster.requests.get((gateway_id, handle))
        if request is not None:
            self._cancel(request, reason, self._clock.now_ns())
        return self._outboxes.take(0)

    def cancel_gateway(self, gateway_id: int) -> Events:
        """Take back all requests of a gateway."""
        now_ns = self._clock.now_ns()
        for request in list(self._roster.requests.values()):
            if request.gateway_id == gateway_id:
                self._cancel(request, FinishReason.CANCELLED, now_ns)
        return self._outboxes.take(0)

    def finish_sample(self, gateway_id: int, handle: int, sample_index: int) -> Events:
        """End one sample as finished: its gateway found a stop string."""
        request = self._roster.requests.get((gateway_id, handle))
        if request is not None and 0 <= sample_index < len(request.sequences):
            sequence = request.sequences[sample_index]
            self._endings.cancel(sequence, FinishReason.STOP, self._clock.now_ns())
        return self._outboxes.take(0)

    def expire(self, now_ns: int) -> Events:
        """End what is too late; also hands out events that wait for any other reason."""
        for request in self._deadlines.pop_expired(now_ns):
            self._cancel(request, FinishReason.DEADLINE, now_ns)
        return self._outboxes.take(0)

    @property
    def next_deadline_ns(self) -> int:
        """When ``expire`` is next due; 0 for never."""
        return self._deadlines.next_ns

    # Steps.

    def take_cancels(self) -> list[int]:
        """Sequences that the executor has to end now, in a message of its own before any plan."""
        return self._endings.take_cancels()

    def plan(self, now_ns: int) -> StepPlan | None:
        """The next plan to send; ``None`` if there is nothing to do or no plan may be sent now."""
        if not self._is_ready or not self._flights.can_send:
            return None
        if self._endings.is_waiting_for_announcement:
            # A sequence that is not wanted any more may start in a step in flight; it would
            # decode unseen in the next one. Its cancel goes out with that step's result.
            return None
        return self._planner.plan(now_ns)

    def on_result(self, result: StepResult, now_ns: int) -> Events:
        """Take in what the executor answered.

        Raises:
            InternalError: RESULT_OUT_OF_ORDER or PLAN_REFUSED; treat the executor as lost.
        """
        self._settlement.settle(result, now_ns)
        num_blocks = self._flights.account.total
        if num_blocks not in (0, self._facts.num_blocks):
            self._resize(num_blocks)
        self._fitting.end_misfits(now_ns)
        return self._outboxes.take(result.step)

    # The executor comes and goes.

    def on_executor_lost(self, now_ns: int) -> Events:
        """All keys and values are gone; everybody waits, nobody fails."""
        self._is_ready = False
        roster = self._roster
        self._flights.restart(PoolAccount())
        self._tenants.wake()
        for sequence in list(roster.sequences.values()):
            self._endings.unannounce(sequence, now_ns)
            if sequence.state is SequenceState.ENDED:
                continue
            sequence.num_tokens_in_flight = 0
            if sequence.state is SequenceState.ADMITTING:
                roster.withdraw(sequence)
            elif sequence.state is SequenceState.RUNNING:
                self._tracer.end_run(sequence, now_ns)
                roster.preempt(sequence, sequence.generation + 1)
            self._tracer.begin_stall(sequence, StallCause.EXECUTOR_LOST, now_ns)
        return self._outboxes.take(0)

    def on_executor_ready(self, facts: ReplicaFacts, account: PoolAccount, now_ns: int) -> Events:
        """An executor is there, with an empty batch; steps count from 1.

        Requests that this one could never serve end with an error.
        """
        if account.total:
            # It may have been resized since these facts were put together.
            facts = replace(facts, num_blocks=account.total)
        self._facts = facts
        self._is_ready = True
        self._flights.restart(account)
        self._preemption.forget(self._recovery_with(facts))
        self._roster.restart(self._capacity_of(facts))
        self._fitting.look_again(facts)
        self._fitting.end_misfits(now_ns)
        for sequence in self._roster.sequences.values():
            if sequence.state in (SequenceState.WAITING, SequenceState.SIBLING):
                self._tracer.begin_stall(sequence, StallCause.QUEUE, now_ns)
        return self._outboxes.take(0)

    @property
    def facts(self) -> ReplicaFacts:
        """What the executor serves, with the blocks that its pool has now."""
        return self._facts

    # The service.

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._is_draining = True

    @property
    def is_idle(self) -> bool:
        """Whether nothing lives, nothing is in flight and nothing waits to be sent."""
        return not (self._roster.sequences or len(self._flights)) and self._outboxes.is_empty

    def snapshot(self) -> SchedulerSnapshot:
        """The books as they stand."""
        return take_snapshot(
            self._roster,
            self._flights,
            is_executor_ready=self._is_ready,
            is_draining=self._is_draining,
        )

    def _capacity_of(self, facts: ReplicaFacts) -> Capacity:
        return Capacity.of(
            facts,
            token_budget=self._options.token_budget,
            max_num_running=self._options.max_num_running,
            prefill_chunk_tokens=self._options.prefill_chunk_tokens,
        )

    def _recovery_with(self, facts: ReplicaFacts) -> Recovery:
        recovery = self._options.recovery
        needs_host = recovery is Recovery.SWAP
        return recovery if facts.num_host_blocks or not needs_host else Recovery.RECOMPUTE

    def _resize(self, num_blocks: int) -> None:
        """The pool has become larger or smaller while it serves."""
        self._facts = replace(self._facts, num_blocks=num_blocks)
        self._roster.capacity = self._capacity_of(self._facts)
        self._fitting.look_again(self._facts)

    def _check_names(self, submission: Submission, gateway_id: int) -> None:
        if submission.request_id in self._roster.names:
            raise AlreadyExistsError(
                "DUPLICATE_REQUEST",
                f"request {submission.request_id!r} is alive already",
                request_id=submission.request_id,
            )
        if (gateway_id, submission.handle) in self._roster.requests:
            raise AlreadyExistsError(
                "DUPLICATE_HANDLE",
                f"handle {submission.handle} names a living request already",
                handle=submission.handle,
            )

    def _add_sequence(self, request: Request, sample_index: int, now_ns: int) -> None:
        submission = request.submission
        resume = submission.resume_token_ids
        is_sibling = sample_index > 0 and request.may_fork
        sequence = Sequence(
            state=SequenceState.SIBLING if is_sibling else SequenceState.WAITING,
            sequence_id=self._next_sequence_id,
            sample_index=sample_index,
            submission=submission,
            gateway_id=request.gateway_id,
            outbox=request.outbox,
            output=array("i", resume[sample_index] if resume else ()),
            span_id=self._tracer.sequence_span_id(
                submission.trace_id, submission.span_id, sample_index
            ),
            submit_ns=now_ns,
            stalls=StallMeter(
                StallCause.QUEUE if self._is_ready else StallCause.EXECUTOR_LOST, now_ns
            ),
        )
        self._next_sequence_id += 1
        request.sequences.append(sequence)
        self._roster.enter(request, sequence)

    def _end_finished(self, request: Request, now_ns: int) -> None:
        for sequence in list(request.sequences):
            output = sequence.output.tolist()
            reason = finished_already(request.submission, self._facts, output)
            if reason:
                self._endings.end(sequence, reason, now_ns)

    def _cancel(self, request: Request, reason: FinishReason, now_ns: int) -> None:
        for sequence in request.sequences:
            self._endings.cancel(sequence, reason, now_ns)


def _empty_pool(facts: ReplicaFacts) -> PoolAccount:
    return PoolAccount(total=facts.num_blocks, free=facts.num_blocks)
