"""Who gives way when blocks run short, how, and for how long nobody new comes in after that.

The oldest running sequence is never a victim, and the pool holds any one sequence in full (see
``request.check_fits``), so somebody always gets to the end, and then the next is the oldest.
"""

from collections.abc import Iterable

from pageframe.core.errors import InternalError
from pageframe.core.plan import Recovery
from pageframe.core.step import RefusedBecause, StepResult
from pageframe.scheduler.budget import Draft
from pageframe.scheduler.flights import Flight, Flights
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Sequence
from pageframe.scheduler.tenants import Tenants

_NUM_COOLING_STEPS = 8
_NUM_REFUSALS_MAX = 8


class Preemption:
    """Chooses victims, last joined first.

    A victim's recovery is the one that is configured, as far as it goes: a swap needs a host tier,
    and a tail is what is short, at least a block, and less than the whole.

    Which victim frees how much of a shared prefix is the executor's knowledge. It takes victims
    only until the step fits, so naming too many costs a longer message and nothing else; naming
    too few costs a refused plan, after which all are named.
    """

    def __init__(self, roster: Roster, flights: Flights, tenants: Tenants) -> None:
        self._roster = roster
        self._flights = flights
        self._tenants = tenants
        self._recovery = Recovery.RECOMPUTE
        self._num_refusals = 0
        self._is_stuck = False
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

    def protect(self, draft: Draft, num_blocks_free: int) -> None:
        """Name victims if the decodes of this step could need more than ``num_blocks_free``.

        Or more than the ceilings of their tenants allow; or if nobody else can go on.
        """
        roster, flight = self._roster, draft.flight
        num_blocks_short = flight.num_blocks - num_blocks_free
        # Prefills hold all blocks, none can grow and nobody decodes: the head has to go on.
        is_stuck = self._is_stuck and roster.prefills and not flight.num_decodes
        if self._num_refusals or is_stuck:
            self._name_all(draft)
        elif num_blocks_short > 0:
            self._name(draft, roster.youngest_first(), roster.oldest, num_blocks_short)
        flight.is_short = bool(flight.beneficiaries)
        for sequences, num_blocks_over in self._tenants.excess(flight.tick):
            flight.over_quota.add(sequences[0].submission.tenant)
            self._name(draft, reversed(sequences[1:]), sequences[0], num_blocks_over)
        if is_stuck:
            draft.ask(roster.prefills.first, draft.plan.must)
        elif not self._num_refusals:
            self._free_stuck_tenant(draft)

    def observe(self, flight: Flight, result: StepResult) -> None:
        """Learn from an applied step, after the sequences have been put where they belong."""
        if result.preempted_ids and flight.is_short:
            self._last_preempt_tick = flight.tick
        has_moved = bool(result.sampled_ids or result.computed_ids)
        if has_moved or result.preempted_ids:
            self._num_refusals = 0
        self._is_stuck = not has_moved and RefusedBecause.POOL_FULL in result.refused_because
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

    def forget(self, recovery: Recovery) -> None:
        """Another executor, another pool; victims recover by ``recovery`` from now on."""
        self._recovery = recovery
        self._num_refusals = 0
        self._is_stuck = False
        self._stuck_heads = []
        self._last_preempt_tick = None
        self._last_freed_tick = None

    def _free_stuck_tenant(self, draft: Draft) -> None:
        """Let a prefill go on whose tenant is at its ceiling and has nothing that decodes.

        Its prefills hold all that the tenant may hold, and none of them can grow: the first has to,
        at the expense of the others. Not in every step, for it may be pins that hold the blocks.
        """
        roster, tick = self._roster, draft.flight.tick
        last = self._last_freed_tick
        if last is not None and tick - last <= _NUM_COOLING_STEPS:
            return
        for sequence_id in self._stuck_heads:
            head = roster.running.get(sequence_id)
            if head is None or head not in roster.prefills or draft.num_tokens_left < 1:
                continue
            tenant = head.submission.tenant
            others = [s for s in roster.running.values() if s.submission.tenant == tenant]
            if any(sequence in roster.decodes for sequence in others):
                continue
            self._last_freed_tick = tick
            draft.flight.over_quota.add(tenant)
            for victim in reversed(others):
                if victim is not head:
                    self._add(draft, victim, head)
            draft.ask(head, draft.plan.must)
            return

    def _name(
        self,
        draft: Draft,
        victims: Iterable[Sequence],
        beneficiary: Sequence | None,
        num_blocks_short: int,
    ) -> None:
        """Name as many of ``victims`` as give up ``num_blocks_short`` for ``beneficiary``."""
        in_flight = self._flights.victim_ids
        for victim in victims:
            num_blocks = self._num_own_blocks(victim)
            self._add(draft, victim, beneficiary, num_blocks, num_blocks_short)
            if victim.sequence_id not in in_flight:
                # Else it may have gone already for the sake of the step before.
                num_blocks_short -= num_blocks
            if num_blocks_short <= 0:
                return

    def _name_all(self, draft: Draft) -> None:
        oldest = self._roster.oldest
        for victim in self._roster.youngest_first():
            self._add(draft, victim, oldest)
        if self._num_refusals > 1 and oldest is not None:
            # Even alone it did not fit: somebody unknown holds blocks. Start from nothing.
            self._add(draft, oldest, oldest)

    def _num_own_blocks(self, sequence: Sequence) -> int:
        """Blocks that come free with it, as far as it shares none of the others."""
        num_tokens = max(sequence.num_computed, sequence.num_shared_tokens)
        block_size = self._roster.capacity.block_size
        return (
            self._roster.capacity.num_blocks(num_tokens) - sequence.num_shared_tokens // block_size
        )

    def _add(
        self,
        draft: Draft,
        victim: Sequence,
        beneficiary: Sequence | None,
        num_blocks: int = 0,
        num_blocks_short: int = 0,
    ) -> None:
        """Name a victim; it may keep what is left of its ``num_blocks`` if fewer are short."""
        assert beneficiary is not None, f"victim {victim.sequence_id}, but nobody runs"
        if victim.sequence_id in draft.flight.beneficiaries:
            return
        recovery, num_tail_blocks = self._recovery, 0
        if recovery is Recovery.TAIL:
            if 0 < num_blocks_short < num_blocks:
                num_tail_blocks = num_blocks_short
            else:
                recovery = Recovery.RECOMPUTE
        draft.flight.beneficiaries[victim.sequence_id] = beneficiary
        draft.plan.victims.add(
            victim.sequence_id,
            victim.generation,
            recovery,
            beneficiary.sequence_id,
            num_tail_blocks,
        )
