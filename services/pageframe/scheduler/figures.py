"""How much waits and runs, by the books that are kept anyway; for metrics."""

from dataclasses import dataclass

from pageframe.scheduler.flights import Flights
from pageframe.scheduler.roster import Roster


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerFigures:
    """Counts of one moment.

    Attributes:
        num_running: Sequences that run.
        num_waiting: Those in line that never ran.
        num_preempted: Those in line that did.
        num_queued_requests: Requests none of whose sequences has run.
        num_queued_tokens: Prompt tokens of those.
        num_steps_in_flight: Plans not yet answered.
        tenants: Sequences that run and that are in line, by tenant.
    """

    num_running: int
    num_waiting: int
    num_preempted: int
    num_queued_requests: int
    num_queued_tokens: int
    num_steps_in_flight: int
    tenants: dict[str, tuple[int, int]]


def take_figures(roster: Roster, flights: Flights) -> SchedulerFigures:
    """Read them; O(tenants)."""
    line = roster.line
    return SchedulerFigures(
        num_running=len(roster.running),
        num_waiting=len(line) - line.num_preempted,
        num_preempted=line.num_preempted,
        num_queued_requests=roster.backlog.num_requests,
        num_queued_tokens=roster.backlog.num_tokens,
        num_steps_in_flight=len(flights),
        tenants={
            share.tenant: (share.num_running, share.num_waiting) for share in roster.shares.all
        },
    )
