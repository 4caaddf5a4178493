"""Takes requests in: what is refused at once, and the books in which the others begin."""

from array import array
from collections.abc import Iterator

from pageframe.core.errors import AlreadyExistsError
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import StallCause, Submission
from pageframe.scheduler.deadlines import Deadlines
from pageframe.scheduler.delivery import Outboxes
from pageframe.scheduler.fitting import Fitting
from pageframe.scheduler.rate_limits import RateLimits
from pageframe.scheduler.request import Request, check_submission
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.searches import with_candidates
from pageframe.scheduler.sequence import Sequence, SequenceState
from pageframe.scheduler.stalls import StallMeter
from pageframe.scheduler.tracing import SchedulerTracer


class Intake:
    """Makes requests of submissions.

    Args:
        roster: Where they begin to wait.
        fitting: Who can be served at all.
        deadlines: Who can be served in time.
        rate_limits: Who has asked for too much of late.
        outboxes: Where their tokens will leave.
        tracer: Names their spans.
        sequence_ids: Ids that nobody has had.
    """

    def __init__(
        self,
        roster: Roster,
        fitting: Fitting,
        deadlines: Deadlines,
        rate_limits: RateLimits,
        outboxes: Outboxes,
        tracer: SchedulerTracer,
        sequence_ids: Iterator[int],
    ) -> None:
        self._roster = roster
        self._fitting = fitting
        self._deadlines = deadlines
        self._rate_limits = rate_limits
        self._outboxes = outboxes
        self._tracer = tracer
        self._sequence_ids = sequence_ids
        self._num_taken = 0

    def take(
        self,
        submission: Submission,
        gateway_id: int,
        facts: ReplicaFacts,
        cause: StallCause,
        now_ns: int,
    ) -> Request:
        """A living request; ``cause`` is what it waits for first. ``Scheduler.submit`` says more.

        What costs least is looked at first, so that a flood of requests is refused cheaply.
        """
        check_submission(submission, facts, now_ns=now_ns)
        self._rate_limits.check(submission, now_ns)
        submission = with_candidates(submission, facts)
        self._fitting.check(submission, facts)
        self._check_names(submission, gateway_id)
        num_tokens = submission.num_sequences * len(submission.prompt_token_ids)
        num_tokens += sum(map(len, submission.resume_token_ids))
        self._roster.backlog.check_room(submission.tenant, num_tokens)
        self._deadlines.check(submission, now_ns)
        self._num_taken += 1
        outbox = self._outboxes.of(gateway_id)
        outbox.num_requests += 1
        request = Request(
            serial=self._num_taken, submission=submission, gateway_id=gateway_id, outbox=outbox
        )
        self._roster.requests[gateway_id, submission.handle] = request
        self._roster.names[submission.request_id] = request
        self._deadlines.add(request, now_ns)
        self._rate_limits.charge(request, now_ns)
        levels = self._rate_limits.levels(submission.tenant, now_ns)
        if levels:
            outbox.events.rates[submission.handle] = levels
        for sample_index in range(submission.num_sequences):
            self._add_sequence(request, sample_index, cause, now_ns)
        return request

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

    def _add_sequence(
        self, request: Request, sample_index: int, cause: StallCause, now_ns: int
    ) -> None:
        submission = request.submission
        resume = submission.resume_token_ids
        is_sibling = sample_index > 0 and request.may_fork
        sequence = Sequence(
            state=SequenceState.SIBLING if is_sibling else SequenceState.WAITING,
            is_steered=submission.beams is not None,
            sequence_id=next(self._sequence_ids),
            sample_index=sample_index,
            submission=submission,
            gateway_id=request.gateway_id,
            outbox=request.outbox,
            output=array("i", resume[sample_index] if resume else ()),
            span_id=self._tracer.sequence_span_id(
                submission.trace_id, submission.span_id, sample_index
            ),
            submit_ns=now_ns,
            stalls=StallMeter(cause, now_ns),
        )
        request.sequences.append(sequence)
        self._roster.enter(request, sequence)
