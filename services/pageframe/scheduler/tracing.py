"""Spans of the scheduler. Span ids of prefill and decode are computed, see ``core.trace``.

sequence                 submission to end
├─ stall                 one measured wait, with its cause and, where known, its culprit
├─ prefill               one chunk
├─ decode                an uninterrupted run, cut every 128 positions
└─ preempt               with a link to the sequence for whose sake it happened

step                     in traces of their own, one per 1,000 steps
"""

from itertools import count

from pageframe.core.plan import Recovery
from pageframe.core.request import StallCause
from pageframe.core.step import FinishReason, SequenceAccount, StepResult, StepTiming
from pageframe.core.trace import (
    AttributeValue,
    NullTraceSink,
    SpanKind,
    TraceSink,
    child_span_id,
    decode_segment,
)
from pageframe.scheduler.flights import Flight
from pageframe.scheduler.sequence import Sequence
from pageframe.scheduler.stalls import Link, Stall
from pageframe.telemetry import spans

_NUM_STEPS_PER_TRACE = 1000


class SchedulerTracer:
    """Writes spans to a sink, and keeps the clocks of stalls whether or not anybody traces.

    Args:
        sink: Where spans go.
        seed: Makes span ids and the traces of steps differ from those of other schedulers.
    """

    def __init__(self, sink: TraceSink, seed: int) -> None:
        self._sink = sink
        self._seed = seed
        self._serials = count(1)
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
        link = _link(culprit)
        self._stall(sequence, sequence.stalls.switch(cause, at_ns, link))

    def end_stall(self, sequence: Sequence, at_ns: int) -> None:
        """The sequence moves."""
        self._stall(sequence, sequence.stalls.switch(None, at_ns))

    def prefill(self, sequence: Sequence, start: int, end: int, result: StepResult) -> None:
        """A chunk ``[start, end)`` was computed."""
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
            },
        )

    def begin_run(self, sequence: Sequence, position: int, at_ns: int) -> None:
        """The sequence has caught up and decodes from ``position`` on."""
        sequence.run_start = position
        sequence.run_start_ns = at_ns

    def end_run(self, sequence: Sequence, at_ns: int) -> None:
        """Write the open decode span, if there is one, up to the last computed position."""
        start, end = sequence.run_start, sequence.num_computed
        if not sequence.span_id or not sequence.is_caught_up or start >= end:
            return
        segment = decode_segment(start)
        self._child(
            spans.DECODE,
            sequence,
            child_span_id(sequence.span_id, SpanKind.DECODE, sequence.generation, segment),
            sequence.run_start_ns,
            at_ns,
            {**_tokens(start, end), spans.GENERATION: sequence.generation},
        )
        self.begin_run(sequence, end, at_ns)

    def preempt(
        self,
        sequence: Sequence,
        beneficiary: Sequence | None,
        recovery: Recovery,
        num_blocks: int,
        num_kept: int,
        timing: StepTiming,
    ) -> None:
        """The sequence lost blocks; it keeps ``num_kept`` computed tokens."""
        if not sequence.span_id:
            return
        link = _link(beneficiary)
        self._child(
            spans.PREEMPT,
            sequence,
            self._next_id(),
            timing.start_ns,
            timing.start_ns + timing.apply_ns,
            {
                spans.PREEMPT_MODE: recovery.name.lower(),
                spans.PREEMPT_VICTIM: sequence.sequence_id,
                spans.PREEMPT_BENEFICIARY: beneficiary.sequence_id if beneficiary else 0,
                spans.PREEMPT_NUM_BLOCKS: num_blocks,
                **_tokens(num_kept, sequence.num_computed),
                spans.GENERATION: sequence.generation,
            },
            link,
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
                spans.NUM_BLOCKS_PEAK: account.num_blocks_peak,
            },
            error=reason.name if reason in (FinishReason.ERROR, FinishReason.DEADLINE) else "",
        )

    def step(self, flight: Flight, result: StepResult) -> None:
        """A step was applied."""
        if not self.is_enabled:
            return
        timing = result.timing
        serial = result.step // _NUM_STEPS_PER_TRACE
        high = child_span_id(self._seed, SpanKind.SEQUENCE, 1, serial)
        low = child_span_id(self._seed, SpanKind.SEQUENCE, 2, serial)
        self._sink.span(
            spans.STEP,
            trace_id=high.to_bytes(8, "big") + low.to_bytes(8, "big"),
            span_id=self._next_id(),
            parent_span_id=0,
            start_ns=timing.start_ns,
            end_ns=timing.end_ns,
            attributes={
                spans.STEP_NUMBER: result.step,
                spans.STEP_NUM_TOKENS: flight.num_decodes
                + sum(chunk.num_tokens for chunk in flight.chunks),
                spans.STEP_NUM_DECODES: flight.num_decodes,
                spans.STEP_NUM_SAMPLED: len(result.sampled_ids),
                spans.STEP_APPLY_MS: timing.apply_ns / 1e6,
                spans.STEP_EXECUTE_MS: timing.execute_ns / 1e6,
                spans.STEP_SAMPLE_MS: timing.sample_ns / 1e6,
            },
        )

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

    def _next_id(self) -> int:
        return child_span_id(self._seed, SpanKind.SEQUENCE, 0, next(self._serials))


def _link(sequence: Sequence | None) -> Link | None:
    if sequence is None or not sequence.span_id:
        return None
    return (sequence.submission.trace_id, sequence.span_id)


def _tokens(start: int, end: int) -> dict[str, AttributeValue]:
    """The half-open interval of positions that a span covers."""
    return {spans.TOKENS_BEGIN: start, spans.TOKENS_END: end}
