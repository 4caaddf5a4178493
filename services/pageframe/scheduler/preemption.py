"""Who gives way when blocks run short, how, and for how long nobody new comes in after that.

The oldest running sequence is never a victim, and the pool holds any one sequence in full (see
``request.check_fits``), so somebody always gets to the end, and then the next is the oldest.
"""

from collections.abc import Iterable

from pageframe.core.errors import InternalError
from pageframe.core.limits import LIMITS
from pageframe.core.replica import ReplicaFacts
from pageframe.core.step import RefusedBecause, StepResult
from pageframe.scheduler.budget import PlanBuilder
from pageframe.scheduler.candidates import Candidates, Shortage
from pageframe.scheduler.flights import Flight, Flights
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Sequence, SequenceState
from pageframe.scheduler.tenants import Tenants

_NUM_COOLING_STEPS = 8
_NUM_REFUSALS_MAX = 8


class Preemption:
    """Names victims, in the order of the policies behind ``candidates``.

    They are looked at youngest first, a few at a time, and each is younger than the one for whose
    sake it goes: whatever a policy says, the oldest goes on, and nobody makes room for a newcomer
    but those of tenants above their part, see ``claims``.

    Which victim frees how much of a shared prefix is the executor's knowledge. It takes victims
    only until the step fits, so naming too many costs a longer message and nothing else; naming
    too few costs a refused plan, after which all are named.
    """

    def __init__(
        self, roster: Roster, flights: Flights, tenants: Tenants, candidates: Candidates
    ) -> None:
        self._roster = roster
        self._flights = flights
        self._tenants = tenants
        self._candidates = candidates
        self._num_refusals = 0
        self._is_stuck = False
        self._num_still_steps = 0
        self._stuck_heads: list[int] = []
        self._last_preempt_tick: int | None = None
        self._last_freed_tick: int | None = None

    def is_cooling(self, tick: int) -> bool:
        """Whether somebody lost blocks within the last few steps.

        Until it has cooled only sequences that fit to their very end come in; otherwise the one
        that was thrown out would come back at once, be the youngest, and be thrown out again.
        """
        last = self._last_preempt_tick
        return last is not None and tick - last <= _NUM_COOLING_STEPS

    def protect(self, builder: PlanBuilder, num_blocks_free: int) -> None:
        """Name victims if the decodes of this step could need more than ``num_blocks_free``.

        Or more than the ceilings of their tenants allow; or if nobody else can go on.
        """
        roster, flight = self._roster, builder.flight
        num_blocks_short = flight.num_blocks - num_blocks_free
        stuck_head = self._stuck_head(flight)
        if self._num_refusals or stuck_head is not None:
            self._name_all(builder)
        elif num_blocks_short > 0:
            num_later = sum(map(roster.decodes.num_blocks_at, _next_ticks(flight.tick)))
            shortage = _shortage(flight, num_blocks_short, num_later)
            self._name(builder, roster.youngest_first(), roster.oldest, shortage)
        flight.is_short = bool(flight.beneficiaries)
        for sequences, num_blocks_over in self._tenants.excess(flight.tick):
            flight.over_quota.add(sequences[0].submission.tenant)
            shortage = _shortage(flight, num_blocks_over)
            self._name(builder, reversed(sequences[1:]), sequences[0], shortage)
        if stuck_head is not None:
            builder.ask_head(stuck_head)
        elif not self._num_refusals:
            self._free_stuck_tenant(builder)

    def observe(self, flight: Flight, result: StepResult) -> None:
        """Learn from an applied step, after the sequences have been put where they belong."""
        if result.preempted_ids and flight.is_short:
            self._last_preempt_tick = flight.tick
        has_moved = bool(result.sampled_ids or result.computed_ids or result.candidates)
        if has_moved or result.preempted_ids:
            self._num_refusals = 0
            self._is_stuck = False
        self._num_still_steps = 0 if has_moved else self._num_still_steps + 1
        if not has_moved and RefusedBecause.POOL_FULL in result.refused_because:
            # Until somebody moves: an empty step behind this one tells nothing else.
            self._is_stuck = True
        self._stuck_heads = [
            sequence_id
            for sequence_id, because in zip(result.refused_ids, result.refused_because, strict=True)
            if because == RefusedBecause.QUOTA and sequence_id in self._roster.running
        ]

    def observe_refusal(self, reason: str) -> None:
        """Learn from a plan that was refused as a whole, and that built on an applied step.

        Raises:
            InternalError: PLAN_REFUSED, when no plan is accepted whatever is given up.
        """
        self._num_refusals += 1
        if self._num_refusals > _NUM_REFUSALS_MAX:
            raise InternalError(
                "PLAN_REFUSED",
                f"the executor refused {self._num_refusals} plans in a row: {reason}",
                num_refusals=self._num_refusals,
            )

    def forget(self, facts: ReplicaFacts) -> None:
        """Another executor, another pool."""
        self._candidates.restart(facts)
        self._num_refusals = 0
        self._is_stuck = False
        self._num_still_steps = 0
        self._stuck_heads = []
        self._last_preempt_tick = None
        self._last_freed_tick = None

    def _stuck_head(self, flight: Flight) -> Sequence | None:
        """Who has to go on when prefills hold all blocks, none can grow and nobody decodes.

        The first that runs. While nobody does, blocks are held by nobody who could give way; and
        one that is still being admitted cannot be in ``must``. Those who would decode if the plans
        in flight went well count as long as these are the first that might not.
        """
        roster = self._roster
        may_decode = flight.num_decodes and self._num_still_steps <= LIMITS.num_steps_in_flight_max
        if not self._is_stuck or may_decode or roster.steered:
            return None
        running = (s for s in roster.prefills if s.state is SequenceState.RUNNING)
        return next(running, None)

    def _free_stuck_tenant(self, builder: PlanBuilder) -> None:
        """Let a prefill go on whose tenant is at its ceiling and has nothing that decodes.

        Its prefills hold all that the tenant may hold, and none of them can grow: the first has to,
        at the expense of the others. Not in every step, for it may be pins that hold the blocks.
        """
        roster, tick = self._roster, builder.flight.tick
        last = self._last_freed_tick
        if last is not None and tick - last <= _NUM_COOLING_STEPS:
            return
        for sequence_id in self._stuck_heads:
            head = roster.running.get(sequence_id)
            if head is None or head not in roster.prefills or builder.num_tokens_left < 1:
                continue
            tenant = head.submission.tenant
            others = [s for s in roster.running.values() if s.submission.tenant == tenant]
            # Not whether they are among the decodes: a plan in flight may only be hoped to go well.
            if any(sequence.is_caught_up for sequence in others):
                continue
            self._last_freed_tick = tick
            builder.flight.over_quota.add(tenant)
            for victim in reversed(others):
                if victim is not head:
                    self.add(builder, victim, head)
            builder.ask_head(head)
            return

    def _name(
        self,
        builder: PlanBuilder,
        victims: Iterable[Sequence],
        beneficiary: Sequence | None,
        shortage: Shortage,
    ) -> None:
        """Name as many of ``victims`` as give up what ``beneficiary`` lacks."""
        in_flight = self._flights.victim_ids
        for victim in self._candidates.ranked(victims, shortage):
            self.add(builder, victim, beneficiary, shortage)
            if victim.sequence_id not in in_flight:
                # Else it may have gone already for the sake of the step before.
                shortage = shortage.less(self._candidates.num_own_blocks(victim))
            if shortage.num_blocks <= 0:
                return

    def _name_all(self, builder: PlanBuilder) -> None:
        oldest = self._roster.oldest
        for victim in self._roster.youngest_first():
            self.add(builder, victim, oldest)
        if self._num_refusals > 1 and oldest is not None:
            # Even alone it did not fit: somebody unknown holds blocks. Start from nothing.
            self.add(builder, oldest, oldest)

    def add(
        self,
        builder: PlanBuilder,
        victim: Sequence,
        beneficiary: Sequence | None,
        shortage: Shortage | None = None,
    ) -> None:
        """Name a victim; it may keep what is not short, unless nobody said: then all has to go."""
        assert beneficiary is not None, f"victim {victim.sequence_id}, but nobody runs"
        flight = builder.flight
        if victim.sequence_id in flight.beneficiaries:
            return
        shortage = shortage or _shortage(flight, 0)
        recovery, num_tail_blocks, costs = self._candidates.recovery_of(victim, shortage)
        flight.beneficiaries[victim.sequence_id] = beneficiary
        flight.costs[victim.sequence_id] = costs
        builder.plan.victims.add(
            victim.sequence_id,
            victim.generation,
            recovery,
            beneficiary.sequence_id,
            num_tail_blocks,
        )


def _shortage(flight: Flight, num_blocks: int, num_blocks_later: int = 0) -> Shortage:
    return Shortage(
        tick=flight.tick,
        now_ns=flight.planned_ns,
        num_blocks=num_blocks,
        num_blocks_soon=num_blocks + num_blocks_later,
    )


def _next_ticks(tick: int) -> range:
    """The steps in which somebody who gave way now would not yet be back."""
    return range(tick + 1, tick + _NUM_COOLING_STEPS)
