"""The scheduler's pure core: requests in, plans out, results in, token events out.

``Scheduler`` conducts; each part guards one thing:

    request      what is malformed                queues       order and bounds of waiting
    roster       who stands where                 decode       who takes a token in every step
    flights      plans not yet answered           budget       what is left of one step
    planner      the next plan                    settlement   what a result means
    admission    who comes in                     preemption   who gives way
    prefix_wait  who waits to share               forks        samples of one prompt
    tenants      what quotas mean                 fitting      what could never be served
    searches     beams, between results and plans beams        one beam search
    endings      the last of a sequence           delivery     tokens on their way out
    stalls       clocks of waiting                tracing      spans
    steering     how long a step may last         policies     who decides, and who looks on
    candidates   whom policies may choose         losses       victims until they are back
    rates        what things cost, measured       witness      what policies are seen doing
    line         who comes next                   shares       what tenants were served
    claims       whose part others take       getting_back what coming back costs
    intake       how requests come in             deadlines    who cannot be over in time
    rate_limits  who comes too often             lateness     when a plan is made

No part awaits or asks the system for the time, so all of it runs unchanged in a simulator.
Whoever drives it sends cancels before plans, and plans and results one at a time in order.
"""

from dataclasses import replace
from itertools import count

from pageframe.core.clock import Clock
from pageframe.core.errors import PageframeError, UnavailableError
from pageframe.core.limits import LIMITS
from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount, ReplicaFacts
from pageframe.core.request import StallCause, Submission, TokenEvents
from pageframe.core.step import FinishReason, StepResult
from pageframe.core.terms import TenantTerms
from pageframe.core.trace import TraceSink
from pageframe.scheduler.admission import Admission
from pageframe.scheduler.budget import Capacity
from pageframe.scheduler.candidates import Candidates
from pageframe.scheduler.claims import Claims
from pageframe.scheduler.deadlines import Deadlines, Prospects
from pageframe.scheduler.delivery import Outboxes
from pageframe.scheduler.endings import Endings
from pageframe.scheduler.figures import SchedulerFigures, take_figures
from pageframe.scheduler.fitting import Fitting
from pageframe.scheduler.flights import Flights
from pageframe.scheduler.forks import Forks
from pageframe.scheduler.intake import Intake
from pageframe.scheduler.lateness import Lateness
from pageframe.scheduler.line import NEVER_NS, Line
from pageframe.scheduler.losses import Losses
from pageframe.scheduler.options import SchedulerOptions
from pageframe.scheduler.planner import Planner
from pageframe.scheduler.preemption import Preemption
from pageframe.scheduler.prefix_wait import PrefixWait
from pageframe.scheduler.queues import Backlog
from pageframe.scheduler.rate_limits import RateLimits
from pageframe.scheduler.rates import Rates
from pageframe.scheduler.request import Request
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.searches import Searches
from pageframe.scheduler.sequence import SequenceState
from pageframe.scheduler.settlement import Settlement
from pageframe.scheduler.shares import Shares
from pageframe.scheduler.snapshot import SchedulerSnapshot, take_snapshot
from pageframe.scheduler.speculation import Speculation
from pageframe.scheduler.steering import Steering
from pageframe.scheduler.tenants import Tenants
from pageframe.scheduler.tracing import SchedulerTracer
from pageframe.scheduler.witness import policies_of

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
        self._sequence_ids = count(options.first_sequence_id)
        self._is_ready, self._is_draining = True, False
        self._outboxes = Outboxes()
        self._flights = Flights(
            LIMITS.num_steps_in_flight_max if options.lookahead else 1,
            PoolAccount(total=facts.num_blocks, free=facts.num_blocks),
        )
        self._tracer = tracer = SchedulerTracer(trace, seed=clock.now_ns())
        self._policies = policies_of(options, tracer, self._flights, clock)
        shares = Shares(options.tenant_weights, num_tokens_ahead=options.token_budget)
        self._roster = Roster(
            self._capacity_of(facts),
            Backlog(options.max_queued_requests, options.max_queued_tokens),
            Line(self._policies.order, shares, ageing_ns=options.priority_ageing_ns or NEVER_NS),
            shares,
        )
        self._tenants = Tenants(self._roster, options.quotas)
        rates = Rates(facts, shares_prefixes=options.shares_prefixes)
        self._prospects = Prospects(
            self._roster,
            num_step_tokens_max=1 + options.num_draft_tokens,
            shares_prefixes=options.shares_prefixes,
        )
        self._deadlines = Deadlines(self._prospects)
        self._lateness = Lateness(self._roster, self._flights, rates)
        self._losses = Losses(self._roster, rates, tracer)
        self._candidates = candidates = Candidates(self._roster, rates, self._policies)
        self._preemption = Preemption(self._roster, self._flights, self._tenants, candidates)
        self._rate_limits = RateLimits(options.rates, clock.now_ns())
        self._endings = Endings(self._roster, self._deadlines, self._rate_limits, tracer)
        self._fitting = Fitting(self._roster, self._tenants, self._endings)
        self._intake = Intake(
            self._roster,
            self._fitting,
            self._deadlines,
            self._rate_limits,
            self._outboxes,
            tracer,
            self._sequence_ids,
        )
        self._steering = Steering(options.target_itl_ns)
        self._speculation = Speculation(
            options.num_draft_tokens, self._roster, self._flights, tracer
        )
        forks = Forks(self._roster)
        self._searches = Searches(
            self._roster, self._endings, self._losses, tracer, self._sequence_ids
        )
        self._planner = self._make_planner(options, forks)
        self._settlement = self._make_settlement(forks)
        self._searches.restart(facts)
        self._preemption.forget(facts)

    # Requests.

    def submit(self, submission: Submission, gateway_id: int) -> None:
        """Take in a request; its events go to ``gateway_id``.

        The lists of ``submission`` are kept and must not be changed afterwards.

        Raises:
            UnavailableError: DRAINING.
            InvalidRequestError: malformed.
            OutOfRangeError: this replica could never serve it.
            DeadlineError: DEADLINE_PASSED or DEADLINE_UNREACHABLE.
            AlreadyExistsError: DUPLICATE_REQUEST or DUPLICATE_HANDLE.
            ResourceExhaustedError: QUEUE_FULL or RATE_LIMITED.
        """
        now_ns = self._clock.now_ns()
        if self._is_draining:
            raise UnavailableError("DRAINING", "this scheduler is shutting down; try another")
        cause = StallCause.QUEUE if self._is_ready else StallCause.EXECUTOR_LOST
        request = self._intake.take(submission, gateway_id, self._facts, cause, now_ns)
        self._endings.end_finished(request, self._facts, now_ns)

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
        for request, error in self._deadlines.pop_expired(now_ns):
            self._cancel(request, FinishReason.DEADLINE, now_ns, error)
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
        return None if self.plan_due_ns(now_ns) else self._planner.plan(now_ns)

    def plan_due_ns(self, now_ns: int) -> int:
        """When to ask for a plan that is held back, unless something happens; 0 for never."""
        return self._lateness.due_ns(now_ns)

    def on_result(self, result: StepResult, now_ns: int) -> Events:
        """Take in what the executor answered.

        Raises:
            InternalError: RESULT_OUT_OF_ORDER or PLAN_REFUSED; treat the executor as lost.
        """
        self._settlement.settle(result, now_ns)
        if result.step and not result.refusal:
            self._prospects.observe(result)
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
        self._searches.forget()
        self._tenants.wake()
        for sequence in list(roster.sequences.values()):
            self._endings.unannounce(sequence, now_ns)
            if sequence.state is SequenceState.ENDED:
                continue
            sequence.num_tokens_in_flight = 0
            self._losses.forget(sequence, now_ns)
            lost_ns = now_ns
            if sequence.state is SequenceState.ADMITTING:
                roster.withdraw(sequence)
            elif sequence.state is SequenceState.RUNNING:
                # It has not moved since the executor's last sign of life.
                lost_ns = self._tracer.clock.end_ns
                self._tracer.end_run(sequence, lost_ns)
                sequence.stalls.lose(StallCause.EXECUTOR_LOST, sequence.num_computed)
                roster.preempt(sequence, sequence.generation + 1)
            self._tracer.begin_stall(sequence, StallCause.EXECUTOR_LOST, lost_ns)
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
        self._preemption.forget(facts)
        self._losses.restart(facts)
        self._steering.forget()
        self._prospects.restart()
        self._speculation.forget()
        self._roster.restart(self._capacity_of(facts))
        self._searches.restart(facts)
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

    def set_terms(self, terms: TenantTerms, now_ns: int) -> Events:
        """Tenants have these terms from now on; who waits and can never fit them ends."""
        self._roster.shares.set_weights(terms.weights)
        self._tenants.set_quotas(terms.quotas)
        self._rate_limits.change(terms.rates, now_ns)
        self._fitting.look_again(self._facts)
        self._fitting.end_misfits(now_ns)
        return self._outboxes.take(0)

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
            self._policies,
            is_executor_ready=self._is_ready,
            is_draining=self._is_draining,
        )

    def figures(self) -> SchedulerFigures:
        """How much waits and runs; cheap, whatever lives."""
        return take_figures(self._roster, self._flights)

    def _make_planner(self, options: SchedulerOptions, forks: Forks) -> Planner:
        admission = Admission(
            self._roster,
            self._flights,
            self._preemption,
            PrefixWait(self._roster, is_enabled=options.shares_prefixes),
            self._tenants,
            self._tracer,
            self._policies.admission,
        )
        return Planner(
            self._roster,
            self._flights,
            self._preemption,
            admission,
            Claims(self._roster, admission, self._preemption, self._candidates),
            forks,
            self._tenants,
            self._steering,
            self._searches,
            self._speculation,
        )

    def _make_settlement(self, forks: Forks) -> Settlement:
        return Settlement(
            self._roster,
            self._flights,
            self._preemption,
            self._losses,
            forks,
            self._tenants,
            self._endings,
            self._tracer,
            self._steering,
            self._lateness,
            self._searches,
            self._speculation,
        )

    def _capacity_of(self, facts: ReplicaFacts) -> Capacity:
        return Capacity.of(
            facts,
            token_budget=self._options.token_budget,
            max_num_running=self._options.max_num_running,
            prefill_chunk_tokens=self._options.prefill_chunk_tokens,
        )

    def _resize(self, num_blocks: int) -> None:
        """The pool has become larger or smaller while it serves."""
        self._facts = replace(self._facts, num_blocks=num_blocks)
        self._roster.capacity = self._capacity_of(self._facts)
        self._fitting.look_again(self._facts)

    def _cancel(
        self,
        request: Request,
        reason: FinishReason,
        now_ns: int,
        error: PageframeError | None = None,
    ) -> None:
        for sequence in request.sequences:
            self._endings.cancel(sequence, reason, now_ns, error)
