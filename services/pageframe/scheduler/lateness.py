"""Makes the plan behind a long step late, so that whoever comes meanwhile is in it.

    step k      [──────────── its prefill takes so long ────────────]
    plan k+1    ├────── newcomers get on ──────┤ made by now, or once it is full
                                               half

A plan is not changed any more once it was sent. Made as soon as step k has begun, it would leave
everybody who comes during step k behind until step k+2, though it has room for them and is not
needed before k is over. While k is short few come; while it is full of prefill, and takes as long
as many decodes, more do, and a burst whose first requests fill no step would take a step more.

Too late costs little: with the result of step k, plan k+1 is made whatever this says, and the
executor has waited for one message. So a mean is enough to go by: what a token that is asked for
took lately, which is less than it takes to compute one where many are found in memory.
"""

from pageframe.core.step import StepResult
from pageframe.scheduler.flights import Flight, Flights
from pageframe.scheduler.rates import Average, Rates
from pageframe.scheduler.roster import Roster

_PREFILL_NS_MIN = 20_000_000
_WINDOW_TOKENS = 16_384


class Lateness:
    """Says how long the next plan may wait.

    Args:
        roster: Who waits, and bounds of a step.
        flights: The step that runs.
        rates: What a step takes without prefill.

    Attributes:
        prefill_ns_min: Behind less prefill than this there is too little to wait for.
    """

    def __init__(self, roster: Roster, flights: Flights, rates: Rates) -> None:
        self._roster = roster
        self._flights = flights
        self._rates = rates
        self._asked_ns = Average(0.0, prior_weight=1.0, window=_WINDOW_TOKENS)
        self.prefill_ns_min = _PREFILL_NS_MIN

    def observe(self, flight: Flight, result: StepResult) -> None:
        """Learn from a step that was applied."""
        num_tokens = flight.num_chunk_tokens
        if num_tokens:
            step_ns = result.timing.end_ns - result.timing.start_ns
            self._asked_ns.add(max(0.0, step_ns - self._rates.base_ns), num_tokens)

    def due_ns(self, now_ns: int) -> int:
        """When the next plan has to be made at the latest; 0 for at once."""
        if len(self._flights) != 1:
            return 0
        # What decodes beside it makes the step longer still, but how many do differs much.
        num_tokens = next(iter(self._flights)).num_chunk_tokens
        prefill_ns = int(num_tokens * self._asked_ns.value)
        if prefill_ns < self.prefill_ns_min or not self._has_room():
            return 0
        due_ns = self._flights.began_ns + prefill_ns // 2
        return due_ns if due_ns > now_ns else 0

    def _has_room(self) -> bool:
        """Whether the next step surely has tokens left for somebody who is not there yet."""
        roster = self._roster
        # Who goes on with a prefill, or comes back, takes all that it can get.
        if len(roster.prefills) or len(roster.steered) or roster.line.num_preempted:
            return False
        num_decodes = roster.decodes.num_at(self._flights.next_tick, len(self._flights))
        return num_decodes + roster.backlog.num_tokens < roster.capacity.token_budget
