"""Makes one plan. Its cost grows with what changes in the step, not with all that is running."""

from pageframe.core.plan import StepPlan
from pageframe.scheduler.admission import Admission
from pageframe.scheduler.budget import PlanBuilder
from pageframe.scheduler.claims import Claims
from pageframe.scheduler.flights import Flight, Flights
from pageframe.scheduler.forks import Forks
from pageframe.scheduler.preemption import Preemption
from pageframe.scheduler.prefill import grow_prefills, num_blocks_owed
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.searches import Searches
from pageframe.scheduler.speculation import Speculation
from pageframe.scheduler.steering import Steering
from pageframe.scheduler.tenants import Tenants


class Planner:
    """Running sequences first, then resumed, then waiting.

    The blocks of a pool, as a plan sees them:

        [ held ][ plans in flight ][ this step's decodes ][ owed to prefills ][ left to admit ]
                ╰──────── free, cached, fenced or yieldable at the last result ───────────────╯
    """

    def __init__(
        self,
        roster: Roster,
        flights: Flights,
        preemption: Preemption,
        admission: Admission,
        claims: Claims,
        forks: Forks,
        tenants: Tenants,
        steering: Steering,
        searches: Searches,
        speculation: Speculation,
    ) -> None:
        self._roster = roster
        self._flights = flights
        self._preemption = preemption
        self._admission = admission
        self._claims = claims
        self._forks = forks
        self._tenants = tenants
        self._steering = steering
        self._searches = searches
        self._speculation = speculation

    def plan(self, now_ns: int) -> StepPlan | None:
        """The next plan, remembered as sent; ``None`` when a step would do nothing."""
        roster, flights = self._roster, self._flights
        if len(roster.steered) and len(flights):
            return None  # What they go on with follows from the result that is still to come.
        tick = flights.next_tick
        num_decodes = roster.decodes.num_at(tick, len(flights))
        others = (roster.steered, roster.prefills, roster.line)
        if not (num_decodes or any(len(place) for place in others)):
            return None
        self._tenants.prepare(tick, flights.account)
        roster.shares.forget(now_ns)
        self._speculation.look_ahead()
        num_blocks_free = flights.num_blocks_free
        num_blocks = roster.decodes.num_blocks_at(tick)
        # While nobody runs, all that is held is pins, and the others too give way to a newcomer.
        account = flights.account
        num_pinned = 0 if roster.running else account.pinned - account.yieldable
        flight = Flight(
            step=flights.next_step,
            builds_on=flights.next_builds_on,
            tick=tick,
            planned_ns=now_ns,
            num_decodes=num_decodes,
            num_context=roster.decodes.num_context_at(tick),
            num_blocks=num_blocks,
        )
        builder = PlanBuilder(
            roster.capacity,
            flight,
            num_blocks_left=(num_blocks_free - num_blocks - num_blocks_owed(roster) + num_pinned),
            allowance=self._steering.allowance(flight),
        )
        self._searches.add_to(builder)
        roster.steered.ask(builder)
        self._preemption.protect(builder, num_blocks_free)
        self._searches.name_beams(builder)
        admission = self._admission
        is_cooling = self._preemption.is_cooling(tick)
        grow_prefills(builder, roster, admission.admit_ahead_of, is_cooling=is_cooling)
        admission.admit(builder)
        self._claims.claim(builder)
        self._forks.add_to(builder)
        admission.announce_ahead(builder)
        if not (num_decodes or builder.has_news):
            return None
        self._speculation.add_to(builder)
        flights.send(builder.flight)
        return builder.plan
