"""What a result means: who got tokens, who ran, who was refused, preempted or released."""

from pageframe.core.request import StallCause
from pageframe.core.step import FinishReason, RefusedBecause, StepResult
from pageframe.scheduler.delivery import take_samples
from pageframe.scheduler.endings import Endings
from pageframe.scheduler.flights import Flight, Flights
from pageframe.scheduler.preemption import Preemption
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import SequenceState
from pageframe.scheduler.tracing import SchedulerTracer

_CAUSE_OF_REFUSAL = {
    RefusedBecause.POOL_FULL: StallCause.KV_FULL,
    RefusedBecause.BEHIND_REFUSED: StallCause.KV_FULL,
    RefusedBecause.QUOTA: StallCause.QUOTA,
    RefusedBecause.NOT_READY: StallCause.EXECUTOR,
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
        endings: Endings,
        tracer: SchedulerTracer,
    ) -> None:
        self._roster = roster
        self._flights = flights
        self._preemption = preemption
        self._endings = endings
        self._tracer = tracer

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
            self._release(result, now_ns)

    def _take_refusal(self, result: StepResult, now_ns: int) -> None:
        flight = self._flights.land_refused(result.step)
        if result.account.total:
            self._flights.account = result.account
        for sequence in flight.announced:
            self._endings.unannounce(sequence, now_ns)
        self._touch_down(flight)
        self._correct(flight)
        if flight.builds_on == self._flights.last_applied_step:
            self._preemption.observe_refusal(result.refusal)

    def _take_step(self, result: StepResult, now_ns: int) -> None:
        flight = self._flights.land(result.step)
        self._flights.account = result.account
        timing = result.timing
        start_ns = timing.start_ns or now_ns
        end_ns = timing.end_ns or now_ns
        self._acknowledge(flight, result)
        self._touch_down(flight)
        self._advance(flight, result, start_ns, end_ns)
        self._deliver(result, end_ns)
        self._explain(flight, result, start_ns)
        self._preempt(flight, result, start_ns)
        self._correct(flight)
        self._release(result, end_ns)
        if self._tracer.is_enabled:
            for sequence in self._roster.decodes.cut_after(flight.tick):
                self._tracer.end_run(sequence, end_ns)
            self._tracer.step(flight, result)
        self._preemption.observe(result, flight.tick)

    def _acknowledge(self, flight: Flight, result: StepResult) -> None:
        for sequence in flight.announced:
            if sequence.state is not SequenceState.ENDED:
                self._endings.acknowledge(sequence)
        for sequence_id, num_cached in zip(
            result.announced_ids, result.num_cached_tokens, strict=True
        ):
            known = self._roster.sequences.get(sequence_id)
            if known is not None:
                known.num_cached_tokens = min(num_cached, known.num_tokens - 1)

    def _touch_down(self, flight: Flight) -> None:
        for chunk in flight.chunks:
            chunk.touch_down()

    def _advance(self, flight: Flight, result: StepResult, start_ns: int, end_ns: int) -> None:
        asked = {chunk.sequence.sequence_id: chunk.num_tokens for chunk in flight.chunks}
        for sequence_id, num_computed in zip(result.computed_ids, result.num_computed, strict=True):
            sequence = self._roster.sequences.get(sequence_id)
            if sequence is None or not sequence.is_living or sequence.is_caught_up:
                continue
            if sequence.state is SequenceState.ADMITTING:
                self._roster.confirm(sequence)
                # It was let in when the plan was made; since then it waited for the step before.
                self._tracer.begin_stall(sequence, StallCause.EXECUTOR, flight.planned_ns)
            self._tracer.end_stall(sequence, start_ns)
            chunk_start = max(
                sequence.num_computed, num_computed - asked.get(sequence_id, num_computed)
            )
            self._tracer.prefill(sequence, chunk_start, num_computed, result)
            sequence.advance(num_computed)
            if sequence.is_caught_up:
                self._tracer.begin_run(sequence, num_computed, end_ns)

    def _deliver(self, result: StepResult, end_ns: int) -> None:
        sequences = self._roster.sequences
        ended = take_samples(result, sequences)
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
            )

    def _explain(self, flight: Flight, result: StepResult, start_ns: int) -> None:
        """Begin the stalls of those that this step left out."""
        for sequence_id, because in zip(result.refused_ids, result.refused_because, strict=True):
            sequence = self._roster.sequences.get(sequence_id)
            if sequence is None or not sequence.is_living or sequence.is_caught_up:
                continue
            cause = _CAUSE_OF_REFUSAL[RefusedBecause(because)]
            if sequence.state is SequenceState.RUNNING:
                self._tracer.begin_stall(sequence, cause, start_ns)
            elif not sequence.has_run:
                self._tracer.begin_stall(sequence, cause, flight.planned_ns)
        for sequence in flight.passed_over:
            if sequence.state is SequenceState.RUNNING and sequence.stalls.cause is None:
                self._tracer.begin_stall(sequence, StallCause.TOKEN_BUDGET, start_ns)

    def _preempt(self, flight: Flight, result: StepResult, start_ns: int) -> None:
        for sequence_id, generation, num_blocks in zip(
            result.preempted_ids,
            result.preempted_generations,
            result.preempted_num_blocks,
            strict=True,
        ):
            sequence = self._roster.sequences.get(sequence_id)
            if sequence is None or not sequence.is_living:
                continue
            tracer = self._tracer
            tracer.end_run(sequence, start_ns)
            tracer.preempt(sequence, flight.beneficiary, num_blocks, result.timing)
            sequence.num_preemptions += 1
            self._roster.preempt(sequence, generation)
            tracer.begin_stall(sequence, StallCause.PREEMPTED, start_ns, flight.beneficiary)

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
            if sequence is not None:
                self._endings.end(
                    sequence,
                    sequence.cancel_reason or FinishReason.ERROR,
                    at_ns,
                    account=result.accounts.get(sequence_id),
                )
