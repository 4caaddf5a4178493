"""The scheduler's books as they stand, for operators and tests."""

from dataclasses import dataclass

from pageframe.core.replica import PoolAccount
from pageframe.core.request import StallCause
from pageframe.scheduler.flights import Flights
from pageframe.scheduler.policies.chosen import Policies, PolicyCount
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSnapshot:
    """One sequence.

    ``num_blocks`` is an estimate from computed tokens; shared blocks are the executor's knowledge.
    ``waits_for`` is ``None`` while it moves.
    """

    sequence_id: int
    request_id: str
    tenant: str
    sample_index: int
    state: SequenceState
    generation: int
    priority: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_computed_tokens: int
    num_blocks: int
    submit_ns: int
    waits_for: StallCause | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSnapshot:
    """The whole scheduler.

    ``step`` is the last one applied; ``account`` is the pool as of then. Samples that wait for
    sample 0 to compute their prompt count as waiting.
    """

    step: int
    num_plans_in_flight: int
    num_requests: int
    num_waiting: int
    num_preempted: int
    num_running: int
    num_queued_requests: int
    num_queued_tokens: int
    is_executor_ready: bool
    is_draining: bool
    account: PoolAccount
    policies: tuple[PolicyCount, ...]
    sequences: tuple[SequenceSnapshot, ...]


def take_snapshot(
    roster: Roster,
    flights: Flights,
    policies: Policies,
    *,
    is_executor_ready: bool,
    is_draining: bool,
) -> SchedulerSnapshot:
    """Copy the books; changes nothing."""
    num_blocks = roster.capacity.num_blocks
    num_siblings = sum(len(request.siblings) for request in roster.requests.values())
    return SchedulerSnapshot(
        step=flights.last_applied_step,
        num_plans_in_flight=len(flights),
        num_requests=len(roster.requests),
        num_waiting=len(roster.line) - roster.line.num_preempted + num_siblings,
        num_preempted=roster.line.num_preempted,
        num_running=len(roster.running),
        num_queued_requests=roster.backlog.num_requests,
        num_queued_tokens=roster.backlog.num_tokens,
        is_executor_ready=is_executor_ready,
        is_draining=is_draining,
        account=flights.account,
        policies=policies.counts(),
        sequences=tuple(
            _sequence_snapshot(sequence, num_blocks(sequence.num_computed))
            for sequence in roster.sequences.values()
        ),
    )


def _sequence_snapshot(sequence: Sequence, num_blocks: int) -> SequenceSnapshot:
    submission = sequence.submission
    return SequenceSnapshot(
        sequence_id=sequence.sequence_id,
        request_id=submission.request_id,
        tenant=submission.tenant,
        sample_index=sequence.sample_index,
        state=sequence.state,
        generation=sequence.generation,
        priority=submission.priority,
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_output_tokens=len(sequence.output),
        num_computed_tokens=sequence.num_computed,
        num_blocks=num_blocks,
        submit_ns=sequence.submit_ns,
        waits_for=sequence.stalls.cause,
    )
