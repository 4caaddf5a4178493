"""Takes leave of sequences: last tokens, completion, spans, and every book they stand in."""

from collections.abc import Iterable

from pageframe.core.errors import (
    InternalError,
    InvalidRequestError,
    NotFoundError,
    PageframeError,
    ResourceExhaustedError,
    UnimplementedError,
)
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Completion
from pageframe.core.step import FinishReason, SequenceAccount
from pageframe.scheduler.deadlines import Deadlines
from pageframe.scheduler.rate_limits import RateLimits
from pageframe.scheduler.request import Request, deadline_passed, finished_already
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Knowledge, Sequence, SequenceState
from pageframe.scheduler.tracing import SchedulerTracer

_GRAMMAR_FAILURES = {
    "GRAMMAR_INVALID": "the grammar has no meaning in the model's vocabulary",
    "GRAMMAR_TOO_COMPLEX": "the grammar takes too much time or memory to follow; make it simpler",
    "GRAMMAR_MISMATCH": "the output to go on from does not follow the grammar",
}


class Endings:
    """Ends sequences by themselves or by cancel.

    A cancel goes to the executor once it knows the sequence: it may overtake plans that wait
    there, and one that came before its announcement would be forgotten.
    """

    def __init__(
        self,
        roster: Roster,
        deadlines: Deadlines,
        rate_limits: RateLimits,
        tracer: SchedulerTracer,
    ) -> None:
        self._roster = roster
        self._deadlines = deadlines
        self._rate_limits = rate_limits
        self._tracer = tracer
        self._cancels: list[int] = []
        self._abandoned: list[int] = []
        self._unacknowledged: set[int] = set()

    @property
    def is_waiting_for_announcement(self) -> bool:
        """Whether a cancelled sequence may still start in a step in flight."""
        return bool(self._unacknowledged)

    @property
    def has_cancels(self) -> bool:
        """Whether cancels wait to be sent."""
        return bool(self._cancels or self._abandoned)

    def take_cancels(self) -> list[int]:
        """Ids to send to the executor now."""
        sequences = self._roster.sequences
        cancels = [sequence_id for sequence_id in self._cancels if sequence_id in sequences]
        cancels += self._abandoned
        self._cancels.clear()
        self._abandoned.clear()
        return cancels

    def abandon(self, sequence_ids: Iterable[int]) -> None:
        """Have the executor end sequences that are in no book here: beams."""
        self._abandoned += sorted(sequence_ids)

    def cancel(
        self,
        sequence: Sequence,
        reason: FinishReason,
        at_ns: int,
        error: PageframeError | None = None,
    ) -> None:
        """End a sequence for a reason from outside; repeated cancels change nothing."""
        if not sequence.is_living:
            return
        sequence.cancel_reason = reason
        sequence.cancel_error = error
        sequence.cancel_ns = self._tracer.moved_until(sequence, at_ns)
        if sequence.knowledge is Knowledge.UNKNOWN or sequence.search is not None:
            self.end(sequence, reason, at_ns)
            return
        self._tracer.end_run(sequence, at_ns)
        self._tracer.end_stall(sequence, at_ns)
        self._tracer.end_preempt(sequence, at_ns)
        sequence.is_muted = True
        self._roster.cancel(sequence)
        if sequence.knowledge is Knowledge.KNOWN:
            self._cancels.append(sequence.sequence_id)
        else:
            self._unacknowledged.add(sequence.sequence_id)

    def acknowledge(self, sequence: Sequence) -> None:
        """The executor knows the sequence; send the cancel that waited for that."""
        sequence.knowledge = Knowledge.KNOWN
        if sequence.sequence_id in self._unacknowledged:
            self._unacknowledged.remove(sequence.sequence_id)
            self._cancels.append(sequence.sequence_id)

    def unannounce(self, sequence: Sequence, at_ns: int) -> None:
        """The plan that announced it or its fork was refused, or its executor is gone."""
        sequence.knowledge = Knowledge.UNKNOWN
        self._roster.line.note_change()
        if sequence.state is SequenceState.CANCELLING:
            self.end(sequence, sequence.cancel_reason, at_ns)

    def end_finished(self, request: Request, facts: ReplicaFacts, at_ns: int) -> None:
        """End samples of a new request that came with all their tokens."""
        for sequence in list(request.sequences):
            output = sequence.output.tolist()
            reason = finished_already(request.submission, facts, output)
            if reason:
                self.end(sequence, reason, at_ns)

    def end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        at_ns: int,
        *,
        account: SequenceAccount | None = None,
        error: PageframeError | None = None,
    ) -> None:
        """Close all books of a sequence and tell its gateway."""
        tracer = self._tracer
        error = error or sequence.cancel_error
        if sequence.is_living:
            tracer.end_run(sequence, at_ns)
            tracer.end_stall(sequence, at_ns)
            tracer.end_preempt(sequence, at_ns)
        self._unacknowledged.discard(sequence.sequence_id)
        if sequence.search is not None:
            self.abandon(sequence.search.executor_ids)
        request = self._roster.forget(sequence)
        account = _complete(account, sequence)
        tracer.sequence(sequence, reason, account, at_ns)
        if reason is FinishReason.DEADLINE and error is None:
            error = deadline_passed(sequence.submission, at_ns)
        elif reason is FinishReason.ERROR and error is None:
            error = failure_of(sequence, "SEQUENCE_FAILED")
        sequence.outbox.complete(
            sequence,
            Completion(
                handle=sequence.handle,
                sample_index=sequence.sample_index,
                finish_reason=reason,
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_cached_tokens=account.num_cached_tokens,
                num_output_tokens=len(sequence.output),
                account=account,
                stall_ns=dict(sequence.stalls.stall_ns),
                compute_ns=sequence.stalls.compute_ns,
                submit_ns=sequence.submit_ns,
                end_ns=sequence.cancel_ns or at_ns,
                error_status=error.status if error else "",
                error_reason=error.reason if error else "",
                error_message=error.message if error else "",
                error_limits=dict(error.limits) if error else {},
            ),
        )
        sequence.search = None
        if request.is_over:
            request.outbox.num_requests -= 1
            self._deadlines.forget(request)
            self._rate_limits.settle(request)


def _complete(account: SequenceAccount | None, sequence: Sequence) -> SequenceAccount:
    """What the executor counted of ``sequence``, with what is counted here."""
    account = account or SequenceAccount()
    return SequenceAccount(
        num_blocks_peak=account.num_blocks_peak,
        num_blocks_shared=account.num_blocks_shared,
        num_copies_on_write=account.num_copies_on_write,
        num_cached_tokens=account.num_cached_tokens,
        num_preemptions=sequence.num_preemptions,
        num_draft_tokens=sequence.num_draft_tokens,
        num_accepted_tokens=sequence.num_accepted_tokens,
    )


def failure_of(sequence: Sequence, reason: str) -> PageframeError:
    """What the completion of a sequence says that the executor ended for ``reason``."""
    handle = sequence.submission.prefix_handle
    if reason == "HANDLE_UNKNOWN":
        return NotFoundError(
            reason, f"no prefix is retained under handle {handle!r}", prefix_handle=handle
        )
    if reason == "PREFIX_MISMATCH":
        return InvalidRequestError(
            reason,
            f"the prompt does not begin with the prefix retained under handle {handle!r}",
            prefix_handle=handle,
            num_prompt_tokens=sequence.num_prompt_tokens,
        )
    if reason == "GRAMMAR_UNAVAILABLE":
        return UnimplementedError(reason, "the replica cannot hold outputs to a grammar")
    if reason in _GRAMMAR_FAILURES:
        return InvalidRequestError(reason, _GRAMMAR_FAILURES[reason])
    if reason == "DEVICE_OUT_OF_MEMORY":
        return ResourceExhaustedError(
            reason, "the memory of the replica's device ran out in a step of this sequence"
        )
    return InternalError(reason, "the executor gave up this sequence")
