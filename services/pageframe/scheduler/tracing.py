"""Spans of the scheduler. Span ids of prefill and decode are computed, see ``core.trace``.

sequence                 submission to end
├─ stall                 one measured wait, with its cause and, where known, its culprit
├─ prefill               one chunk
├─ decode                an uninterrupted run, cut every 128 positions
└─ preempt               from a loss of blocks until they are back, with a link to whom it served

step                     in traces of their own, one per 1,000 steps; linked with its chunks
policy.disagreement      beside them: a shadow would have decided otherwise
policy.fault             likewise: a policy that is asked no more
"""

from itertools import count, islice

from pageframe.core.request import StallCause
from pageframe.core.step import FinishReason, SequenceAccount, StepResult
from pageframe.core.trace import (
    AttributeValue,
    NullTraceSink,
    NumberColumns,
    NumberRow,
    SpanKind,
    TraceSink,
    child_span_id,
    decode_segment,
)
from pageframe.core.units import NANOSECONDS_PER_MILLISECOND
from pageframe.scheduler.flights import Flight
from pageframe.scheduler.policies.guard import PolicyFault
from pageframe.scheduler.policies.shadow import Disagreement
from pageframe.scheduler.sequence import Loss, Sequence
from pageframe.scheduler.stalls import Link, Stall, StepClock
from pageframe.telemetry import spans

_NUM_STEPS_PER_TRACE = 1000
# A shadow may disagree many times in a step; beyond this a trace ends with the step.
_NUM_SPANS_PER_TRACE = 5000
# What OpenTelemetry lets a span have by default.
_NUM_LINKS_MAX = 128
_MASK_64 = (1 << 64) - 1
_STEP_COLUMNS = NumberColumns(
    {
        spans.STEP_NUMBER: int,
        spans.STEP_NUM_TOKENS: int,
        spans.STEP_NUM_DECODES: int,
        spans.STEP_NUM_SAMPLED: int,
        spans.STEP_APPLY_MS: float,
        spans.STEP_EXECUTE_MS: float,
        spans.STEP_SAMPLE_MS: float,
    }
)


class SchedulerTracer:
    """Writes spans to a sink, and keeps the clocks of stalls whether or not anybody traces.

    Args:
        sink: Where spans go.
        seed: Makes span ids and the traces of steps differ from those of other schedulers.

    Attributes:
        is_enabled: Whether anybody traces.
        clock: Totals over all steps; whoever takes in a result lets it land here first.
    """

    def __init__(self, sink: TraceSink, seed: int) -> None:
        self._sink = sink
        self._seed = seed
        self._serials = count(1)
        # Of this scheduler: those of an executor begin again with 1 when it does.
        self._num_steps = 0
        self._num_steps_traces = 0
        self._steps_trace_id = self._next_steps_trace()
        self._num_spans_in_trace = 0
        # Ids count on from two places of this scheduler's own: to draw each takes 1 us.
        self._ids_start = child_span_id(seed, SpanKind.SEQUENCE, 0, 0)
        self._step_ids_start = child_span_id(seed, SpanKind.SEQUENCE, 3, 0)
        self.clock = StepClock()
        self.is_enabled = not isinstance(sink, NullTraceSink)

    def sequence_span_id(self, trace_id: bytes, span_id: bytes, sample_index: int) -> int:
        """Span id of a new sequence; 0 when it is not traced."""
        if not self.is_enabled or not trace_id:
            return 0
        parent = int.from_bytes(span_id, "big")
        return child_span_id(parent, SpanKind.SEQUENCE, 0, sample_index)

    def begin_stall(
        self, sequence: Sequence, cause: StallCause, at_ns: int, culprit: Sequence | None = None
    ) -> None:
        """The sequence waits for ``cause`` from now on, and no longer for what it did."""
        if sequence.stalls.cause is None and sequence.has_run:
            self._explain_steps_without(sequence, at_ns)
            sequence.stalls.count_gaps(self.clock)
        link = _link(culprit)
        self._stall(sequence, sequence.stalls.switch(cause, at_ns, link))

    def end_stall(self, sequence: Sequence, at_ns: int) -> None:
        """The sequence moves."""
        if sequence.stalls.cause is not None:
            self._stall(sequence, sequence.stalls.switch(None, at_ns))
            sequence.stalls.mark(self.clock, at_ns)

    def prefill(self, sequence: Sequence, start: int, end: int, result: StepResult) -> None:
        """A chunk ``[start, end)`` was computed."""
        self._explain_steps_without(sequence, result.timing.start_ns)
        lost_cause = sequence.stalls.count_chunk(self.clock, start)
        if not sequence.span_id:
            return
        self._child(
            spans.PREFILL,
            sequence,
            child_span_id(sequence.span_id, SpanKind.PREFILL, sequence.generation, start),
            result.timing.start_ns,
            result.timing.end_ns,
            {
                **_tokens(start, end),
                spans.STEP_NUMBER: result.step,
                spans.GENERATION: sequence.generation,
                **({spans.STALL_CAUSE: lost_cause.name.lower()} if lost_cause else {}),
            },
            (self._steps_trace_id, self._step_span_id()),
        )

    def begin_run(self, sequence: Sequence, position: int, at_ns: int) -> None:
        """The sequence has caught up and decodes from ``position`` on."""
        sequence.run_start = position
        sequence.run_start_ns = at_ns
        sequence.stalls.mark(self.clock, at_ns)

    def end_run(self, sequence: Sequence, at_ns: int) -> None:
        """Write the open decode span, if there is one, up to the last computed position."""
        start, end = sequence.run_start, sequence.num_computed
        if not sequence.is_caught_up:
            return
        gaps_ns = sequence.stalls.count_run(self.clock, at_ns)
        if not sequence.span_id or start >= end:
            return
        segment = decode_segment(start)
        self._child(
            spans.DECODE,
            sequence,
            child_span_id(sequence.span_id, SpanKind.DECODE, sequence.generation, segment),
            sequence.run_start_ns,
            at_ns,
            {
                **_tokens(start, end),
                spans.GENERATION: sequence.generation,
                spans.DECODE_GAPS_MS: gaps_ns / NANOSECONDS_PER_MILLISECOND,
                **_drafts(sequence),
            },
        )
        sequence.run_start = end
        sequence.run_start_ns = at_ns
        sequence.run_drafts_start = (sequence.num_draft_tokens, sequence.num_accepted_tokens)

    def cut_run(self, sequence: Sequence, at_ns: int) -> None:
        """End the open decode span if drafts have taken the sequence past its longest."""
        has_passed = decode_segment(sequence.num_computed) > decode_segment(sequence.run_start)
        if self.is_enabled and has_passed:
            self.end_run(sequence, at_ns)

    def preempt(self, sequence: Sequence, loss: Loss) -> None:
        """The sequence lost blocks; its span is written when it is back, see ``end_preempt``."""
        self.end_preempt(sequence, loss.start_ns)
        sequence.stalls.lose(StallCause.PREEMPTED, sequence.num_computed)
        sequence.loss = loss

    def end_preempt(self, sequence: Sequence, at_ns: int) -> None:
        """The sequence is back, has ended or loses blocks again; nothing if it lost none."""
        loss, sequence.loss = sequence.loss, None
        if loss is None or not sequence.span_id:
            return
        beneficiary = loss.beneficiary
        self._child(
            spans.PREEMPT,
            sequence,
            self._next_id(),
            loss.start_ns,
            at_ns,
            {
                spans.PREEMPT_MODE: loss.recovery.name.lower(),
                spans.PREEMPT_VICTIM: sequence.sequence_id,
                spans.PREEMPT_BENEFICIARY: beneficiary.sequence_id if beneficiary else 0,
                spans.PREEMPT_NUM_BLOCKS: loss.num_blocks,
                spans.PREEMPT_ESTIMATE_MS: loss.estimate_ns / NANOSECONDS_PER_MILLISECOND,
                spans.PREEMPT_ACTUAL_MS: loss.spent_ns / NANOSECONDS_PER_MILLISECOND,
                spans.PREEMPT_IS_BACK: loss.is_back,
                **_tokens(loss.num_kept, loss.num_computed),
                spans.GENERATION: loss.generation,
            },
            _link(beneficiary),
        )

    def disagreement(self, disagreement: Disagreement, step: int, at_ns: int) -> None:
        """A shadow would have decided otherwise in the plan for ``step``."""
        self._policy(
            spans.POLICY_DISAGREEMENT,
            step,
            at_ns,
            {
                spans.POLICY_GROUP: disagreement.group,
                spans.POLICY_NAME: disagreement.name,
                spans.POLICY_SHADOW_NAME: disagreement.shadow_name,
                spans.POLICY_CHOICE: disagreement.choice,
                spans.POLICY_SHADOW_CHOICE: disagreement.shadow_choice,
            },
        )

    def policy_fault(self, fault: PolicyFault, step: int, at_ns: int) -> None:
        """A policy is asked no more from the plan for ``step`` on."""
        self._policy(
            spans.POLICY_FAULT,
            step,
            at_ns,
            {
                spans.POLICY_GROUP: fault.group,
                spans.POLICY_NAME: fault.name,
                spans.POLICY_IS_SHADOW: fault.is_shadow,
            },
            error=fault.why,
        )

    def sequence(
        self, sequence: Sequence, reason: FinishReason, account: SequenceAccount, at_ns: int
    ) -> None:
        """The sequence ended."""
        if not sequence.span_id:
            return
        submission = sequence.submission
        self._sink.span(
            spans.SEQUENCE,
            trace_id=submission.trace_id,
            span_id=sequence.span_id,
            parent_span_id=int.from_bytes(submission.span_id, "big"),
            start_ns=sequence.submit_ns,
            end_ns=at_ns,
            attributes={
                spans.SEQUENCE_ID: sequence.sequence_id,
                spans.REQUEST_ID: submission.request_id,
                spans.TENANT: submission.tenant,
                spans.SAMPLE_INDEX: sequence.sample_index,
                spans.FINISH_REASON: reason.name.lower(),
                spans.GEN_AI_USAGE_INPUT_TOKENS: sequence.num_prompt_tokens,
                spans.GEN_AI_USAGE_OUTPUT_TOKENS: len(sequence.output),
                spans.NUM_CACHED_TOKENS: account.num_cached_tokens,
                spans.NUM_PREEMPTIONS: account.num_preemptions,
                spans.NUM_DRAFT_TOKENS: account.num_draft_tokens,
                spans.NUM_ACCEPTED_TOKENS: account.num_accepted_tokens,
                spans.NUM_BLOCKS_PEAK: account.num_blocks_peak,
            },
            error=reason.name if reason in (FinishReason.ERROR, FinishReason.DEADLINE) else "",
        )

    def step(self, flight: Flight, result: StepResult) -> None:
        """A step was applied."""
        if not self.is_enabled:
            return
        timing = result.timing
        links = (_link(chunk.sequence) for chunk in flight.chunks)
        self._sink.span(
            spans.STEP,
            trace_id=self._steps_trace_id,
            span_id=self._step_span_id(),
            parent_span_id=0,
            start_ns=timing.start_ns,
            end_ns=timing.end_ns,
            attributes=NumberRow(
                _STEP_COLUMNS,
                result.step,
                flight.num_decodes + sum(chunk.num_tokens for chunk in flight.chunks),
                flight.num_decodes,
                len(result.sampled_ids),
                timing.apply_ns / NANOSECONDS_PER_MILLISECOND,
                timing.execute_ns / NANOSECONDS_PER_MILLISECOND,
                timing.sample_ns / NANOSECONDS_PER_MILLISECOND,
            ),
            links=tuple(islice(filter(None, links), _NUM_LINKS_MAX)),
        )
        self._num_steps += 1
        self._num_spans_in_trace += 1
        is_full = self._num_spans_in_trace >= _NUM_SPANS_PER_TRACE
        if is_full or self._num_steps % _NUM_STEPS_PER_TRACE == 0:
            self._steps_trace_id = self._next_steps_trace()
            self._num_spans_in_trace = 0

    def _policy(
        self,
        name: str,
        step: int,
        at_ns: int,
        attributes: dict[str, AttributeValue],
        error: str = "",
    ) -> None:
        """A moment in the trace of the steps."""
        if not self.is_enabled:
            return
        self._num_spans_in_trace += 1
        self._sink.span(
            name,
            trace_id=self._steps_trace_id,
            span_id=self._next_id(),
            parent_span_id=0,
            start_ns=at_ns,
            end_ns=at_ns,
            attributes={spans.STEP_NUMBER: step, **attributes},
            error=error,
        )

    def moved_until(self, sequence: Sequence, at_ns: int) -> int:
        """Up to when it is known at ``at_ns`` what the sequence did.

        That is now while it waits, and the end of the newest step while it moves.
        """
        return at_ns if sequence.stalls.cause is not None else self.clock.end_ns

    def _explain_steps_without(self, sequence: Sequence, at_ns: int) -> None:
        stalls = sequence.stalls
        if not sequence.is_caught_up and stalls.is_left_out(self.clock, at_ns):
            stalls.switch(StallCause.EXECUTOR, stalls.since_ns)
            self.end_stall(sequence, at_ns)

    def _stall(self, sequence: Sequence, stall: Stall | None) -> None:
        if stall is None or not sequence.span_id:
            return
        self._child(
            spans.STALL,
            sequence,
            self._next_id(),
            stall.start_ns,
            stall.end_ns,
            {spans.STALL_CAUSE: stall.cause.name.lower()},
            stall.culprit,
        )

    def _child(
        self,
        name: str,
        sequence: Sequence,
        span_id: int,
        start_ns: int,
        end_ns: int,
        attributes: dict[str, AttributeValue],
        link: Link | None = None,
    ) -> None:
        attributes[spans.SEQUENCE_ID] = sequence.sequence_id
        # A viewer finds spans by the tags of one span: `stall` of this tenant with this cause.
        attributes[spans.TENANT] = sequence.submission.tenant
        self._sink.span(
            name,
            trace_id=sequence.submission.trace_id,
            span_id=span_id,
            parent_span_id=sequence.span_id,
            start_ns=start_ns,
            end_ns=max(start_ns, end_ns),
            attributes=attributes,
            links=(link,) if link else (),
        )

    def _step_span_id(self) -> int:
        """The span of the step whose result is taken in, or comes next."""
        return (self._step_ids_start + self._num_steps) & _MASK_64 or 1

    def _next_steps_trace(self) -> bytes:
        """A trace for steps to come, and for what belongs to no request in them."""
        serial = self._num_steps_traces
        self._num_steps_traces += 1
        high = child_span_id(self._seed, SpanKind.SEQUENCE, 1, serial)
        low = child_span_id(self._seed, SpanKind.SEQUENCE, 2, serial)
        return high.to_bytes(8, "big") + low.to_bytes(8, "big")

    def _next_id(self) -> int:
        return (self._ids_start + next(self._serials)) & _MASK_64 or 1


def _link(sequence: Sequence | None) -> Link | None:
    if sequence is None or not sequence.span_id:
        return None
    return (sequence.submission.trace_id, sequence.span_id)


def _drafts(sequence: Sequence) -> dict[str, AttributeValue]:
    """Drafts of the open decode span, if there are any."""
    num_drafted, num_accepted = sequence.run_drafts_start
    if sequence.num_draft_tokens == num_drafted:
        return {}
    return {
        spans.NUM_DRAFT_TOKENS: sequence.num_draft_tokens - num_drafted,
        spans.NUM_ACCEPTED_TOKENS: sequence.num_accepted_tokens - num_accepted,
    }


def _tokens(start: int, end: int) -> dict[str, AttributeValue]:
    """The half-open interval of positions that a span covers."""
    return {spans.TOKENS_BEGIN: start, spans.TOKENS_END: end}
