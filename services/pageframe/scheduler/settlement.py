"""What a result means: who got tokens, who ran, who was refused, preempted or released."""

from pageframe.core.errors import PageframeError
from pageframe.core.plan import Recovery
from pageframe.core.request import StallCause
from pageframe.core.step import FinishReason, RefusedBecause, StepResult
from pageframe.scheduler.culprits import culprit_of
from pageframe.scheduler.endings import Endings, failure_of
from pageframe.scheduler.flights import Flight, Flights
from pageframe.scheduler.forks import Forks
from pageframe.scheduler.lateness import Lateness
from pageframe.scheduler.losses import Losses
from pageframe.scheduler.preemption import Preemption
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.searches import Searches
from pageframe.scheduler.sequence import Knowledge, Sequence, SequenceState
from pageframe.scheduler.speculation import Speculation
from pageframe.scheduler.steering import Steering
from pageframe.scheduler.tenants import Tenants
from pageframe.scheduler.tracing import SchedulerTracer

_CAUSE_OF_REFUSAL = {
    RefusedBecause.POOL_FULL: StallCause.KV_FULL,
    RefusedBecause.BEHIND_REFUSED: StallCause.KV_FULL,
    RefusedBecause.QUOTA: StallCause.QUOTA,
    RefusedBecause.NOT_READY: StallCause.EXECUTOR,
    RefusedBecause.PROMOTING: StallCause.SWAP_IN,
}


class Settlement:
    """Brings the books in line with results.

    Sequences that a result names and that are gone by now are passed over: a cancel and a result
    may cross on the wire.
    """

    def __init__(
        self,
        roster: Roster,
        flights: Flights,
        preemption: Preemption,
        losses: Losses,
        forks: Forks,
        tenants: Tenants,
        endings: Endings,
        tracer: SchedulerTracer,
        steering: Steering,
        lateness: Lateness,
        searches: Searches,
        speculation: Speculation,
    ) -> None:
        self._roster = roster
        self._flights = flights
        self._preemption = preemption
        self._losses = losses
        self._forks = forks
        self._tenants = tenants
        self._endings = endings
        self._tracer = tracer
        self._steering = steering
        self._lateness = lateness
        self._searches = searches
        self._speculation = speculation

    def settle(self, result: StepResult, now_ns: int) -> None:
        """Take in a result, a refusal, or a report outside any step.

        Raises:
            InternalError: RESULT_OUT_OF_ORDER or PLAN_REFUSED; the executor cannot be trusted.
        """
        if result.refusal:
            self._take_refusal(result, now_ns)
        elif result.step:
            self._take_step(result, now_ns)
        else:
            self._flights.account = result.account
            self._tenants.wake()
            self._release(result, now_ns)
        self._searches.drop_ended()

    def _take_refusal(self, result: StepResult, now_ns: int) -> None:
        flight = self._flights.land_refused(result.step)
        if result.account.total:
            self._flights.account = result.account
        for sequence in flight.announced:
            self._endings.unannounce(sequence, now_ns)
        for child in flight.forked:
            self._unfork(child, now_ns)
        self._touch_down(flight)
        self._correct(flight)
        if flight.builds_on == self._flights.last_applied_step:
            self._preemption.observe_refusal(result.refusal)

    def _take_step(self, result: StepResult, now_ns: int) -> None:
        flight = self._flights.land(result.step, now_ns)
        self._flights.account = result.account
        timing = result.timing
        start_ns = timing.start_ns or now_ns
        end_ns = timing.end_ns or now_ns
        self._tracer.clock.land(start_ns, end_ns)
        self._losses.observe(result, self._roster.sequences)
        self._acknowledge(flight, result)
        self._touch_down(flight)
        self._advance(flight, result, start_ns, end_ns)
        unforked = self._take_forks(flight, result, end_ns)
        self._speculation.count(result)
        self._deliver(result, end_ns)
        self._searches.settle(flight, result, start_ns, end_ns)
        self._speculation.settle(result, end_ns)
        self._explain(flight, result, start_ns)
        self._preempt(flight, result, start_ns)
        self._correct(flight)
        for child in unforked:
            self._unfork(child, end_ns)
        self._forks.settle()
        self._release(result, end_ns)
        if self._tracer.is_enabled:
            for sequence in self._roster.decodes.cut_after(flight.tick):
                self._tracer.end_run(sequence, end_ns)
            for sequence in self._roster.steered.cut():
                self._tracer.end_run(sequence, end_ns)
            self._tracer.step(flight, result)
        self._preemption.observe(flight, result)
        self._steering.observe(flight, result)
        self._lateness.observe(flight, result)
        self._speculation.observe(flight, result)

    def _acknowledge(self, flight: Flight, result: StepResult) -> None:
        for sequence in flight.announced:
            if sequence.state is not SequenceState.ENDED:
                self._endings.acknowledge(sequence)
        for sequence_id, num_cached, leader_id, num_leader_tokens in zip(
            result.announced_ids,
            result.num_cached_tokens,
            result.leader_ids,
            result.num_leader_tokens,
            strict=True,
        ):
            known = self._roster.sequences.get(sequence_id)
            if known is not None:
                known.num_cached_tokens = min(num_cached, known.num_tokens - 1)
                known.may_share = True
                known.leader_id = leader_id
                known.num_leader_tokens = num_leader_tokens

    def _touch_down(self, flight: Flight) -> None:
        for chunk in flight.chunks:
            chunk.touch_down()

    def _advance(self, flight: Flight, result: StepResult, start_ns: int, end_ns: int) -> None:
        for sequence_id, num_computed, first_position in zip(
            result.computed_ids, result.num_computed, result.first_positions, strict=True
        ):
            sequence = self._roster.sequences.get(sequence_id)
            if sequence is None or not sequence.is_living or sequence.is_caught_up:
                continue
            if sequence.state is SequenceState.ADMITTING:
                self._confirm(flight, sequence, first_position)
            self._tracer.end_stall(sequence, start_ns)
            self._tracer.prefill(sequence, first_position, num_computed, result)
            sequence.advance(num_computed)
            if sequence.is_caught_up:
                self._roster.prefixes.end(sequence)
                self._losses.end(sequence, end_ns)
                self._tracer.begin_run(sequence, num_computed, end_ns)

    def _confirm(self, flight: Flight, sequence: Sequence, first_position: int) -> None:
        """It was admitted, and what is before ``first_position`` was found."""
        if not sequence.has_run:
            sequence.num_given_tokens = first_position
        self._roster.confirm(sequence, first_position)
        sequence.num_shared_tokens = first_position
        self._roster.prefixes.confirm(sequence, first_position)
        # It was let in when the plan was made; since then it waited for the step before.
        self._tracer.begin_stall(sequence, StallCause.EXECUTOR, flight.planned_ns)
        request = self._roster.parents.get(sequence.sequence_id)
        for sibling in request.siblings if request is not None else ():
            self._tracer.begin_stall(
                sibling, StallCause.PREFIX_WAIT, flight.planned_ns, culprit=sequence
            )

    def _take_forks(self, flight: Flight, result: StepResult, end_ns: int) -> list[Sequence]:
        """Let children run that were forked; returns those that were not."""
        forked = set(result.forked_ids)
        unforked = []
        for child in flight.forked:
            if child.sequence_id not in forked:
                unforked.append(child)
                continue
            self._endings.acknowledge(child)
            if child.state is SequenceState.ADMITTING:
                self._roster.confirm(child, child.num_prompt_tokens)
                self._tracer.end_stall(child, end_ns)
                child.advance(child.num_prompt_tokens)
                self._tracer.begin_run(child, child.num_prompt_tokens, end_ns)
        return unforked

    def _unfork(self, child: Sequence, at_ns: int) -> None:
        """The executor knows nothing of ``child``; it waits again."""
        if child.state is SequenceState.ENDED:
            return
        self._endings.unannounce(child, at_ns)
        if child.state is SequenceState.ADMITTING:
            self._roster.withdraw(child)

    def _deliver(self, result: StepResult, end_ns: int) -> None:
        sequences = self._roster.sequences
        ended = self._roster.lockstep.take(result, sequences)
        for sequence_id, logprobs in result.prompt_logprobs.items():
            sequence = sequences.get(sequence_id)
            if sequence is None or not sequence.is_living:
                continue
            request = self._roster.request_of(sequence)
            if not request.has_prompt_logprobs:
                request.has_prompt_logprobs = True
                request.outbox.events.prompt_logprobs[sequence.handle] = logprobs
        for sequence, reason in ended:
            # A sequence that was being cancelled ends for the reason that came first.
            self._endings.end(
                sequence,
                sequence.cancel_reason or reason,
                end_ns,
                account=result.accounts.get(sequence.sequence_id),
                error=_error_of(sequence, result),
            )

    def _explain(self, flight: Flight, result: StepResult, start_ns: int) -> None:
        """Begin the stalls of those that this step left out."""
        for sequence_id, because in zip(result.refused_ids, result.refused_because, strict=True):
            sequence = self._roster.sequences.get(sequence_id)
            if sequence is None or not sequence.is_living or sequence.is_caught_up:
                continue
            cause = _CAUSE_OF_REFUSAL[RefusedBecause(because)]
            if because == RefusedBecause.QUOTA:
                self._tenants.rest(sequence.submission.tenant, flight.tick, result.account)
            if because == RefusedBecause.POOL_FULL:
                sequence.may_share = False
            culprit = culprit_of(sequence, cause, flight, self._roster)
            if sequence.state is SequenceState.RUNNING:
                self._tracer.begin_stall(sequence, cause, start_ns, culprit)
            elif not sequence.has_run or cause is StallCause.SWAP_IN:
                self._tracer.begin_stall(sequence, cause, flight.planned_ns, culprit)
        for sequence, cause in flight.passed_over:
            is_running = sequence.state is SequenceState.RUNNING
            # It may have found more than expected, and then it decoded unasked.
            if is_running and not sequence.is_caught_up and sequence.stalls.cause is None:
                culprit = culprit_of(sequence, cause, flight, self._roster)
                self._tracer.begin_stall(sequence, cause, start_ns, culprit)

    def _preempt(self, flight: Flight, result: StepResult, start_ns: int) -> None:
        for index, (sequence_id, generation, recovery, num_kept) in enumerate(
            zip(
                result.preempted_ids,
                result.preempted_generations,
                result.preempted_recoveries,
                result.preempted_num_computed,
                strict=True,
            )
        ):
            sequence = self._roster.sequences.get(sequence_id)
            if sequence is None or not sequence.is_living:
                continue
            tracer = self._tracer
            beneficiary = flight.beneficiaries.get(sequence_id)
            tracer.end_run(sequence, start_ns)
            self._losses.begin(sequence, flight, result, index, start_ns)
            sequence.num_preemptions += 1
            sequence.preempt_tick = flight.tick
            if num_kept:
                next_tick = self._flights.num_applied + 1
                self._roster.cut(sequence, generation, num_kept, next_tick)
            else:
                num_swapped = sequence.num_computed if recovery is Recovery.SWAP else 0
                self._roster.preempt(sequence, generation, num_swapped=num_swapped)
            tracer.begin_stall(sequence, StallCause.PREEMPTED, start_ns, beneficiary)
            if sequence.submission.tenant in flight.over_quota:
                # What it gave up must not go to a newcomer of the same tenant.
                self._tenants.rest(sequence.submission.tenant, flight.tick, result.account)

    def _correct(self, flight: Flight) -> None:
        """Put right what the plan expected of its entries and the result did not confirm."""
        next_tick = self._flights.num_applied + 1
        for chunk in flight.chunks:
            sequence = chunk.sequence
            if not chunk.is_current:
                continue
            if sequence.state is SequenceState.RUNNING or sequence.num_tokens_in_flight:
                if sequence.is_living:
                    self._roster.correct(sequence, next_tick)
            elif sequence.state is SequenceState.ADMITTING:
                self._roster.withdraw(sequence)

    def _release(self, result: StepResult, at_ns: int) -> None:
        for sequence_id in result.released:
            sequence = self._roster.sequences.get(sequence_id)
            # One whose beams run for it has been released long before its end.
            if sequence is not None and sequence.knowledge is not Knowledge.UNKNOWN:
                self._endings.end(
                    sequence,
                    sequence.cancel_reason or FinishReason.ERROR,
                    at_ns,
                    account=result.accounts.get(sequence_id),
                    error=_error_of(sequence, result),
                )


def _error_of(sequence: Sequence, result: StepResult) -> PageframeError | None:
    """Why the executor ended ``sequence``, where it says more than that it did."""
    reason = result.errors.get(sequence.sequence_id, "")
    return failure_of(sequence, reason) if reason else None
