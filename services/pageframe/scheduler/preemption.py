"""Who gives way when blocks run short, how, and for how long nobody new comes in after that.

The oldest running sequence is never a victim, and the pool holds any one sequence in full (see
``request.check_fits``), so somebody always gets to the end, and then the next is the oldest.
"""

from collections.abc import Iterable

from pageframe.core.errors import InternalError
from pageframe.core.step import Recovery, RefusedBecause, StepResult
from pageframe.scheduler.budget import Draft
from pageframe.scheduler.flights import Flights
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

    def __init__(
        self, roster: Roster, flights: Flights, tenants: Tenants, recovery: Recovery
    ) -> None:
        self._roster = roster
        self._flights = flights
        self._tenants = tenants
        self.recovery = recovery
        self._num_refusals = 0
        self._is_stuck = False
        self._last_preempt_tick: int | None = None

    def is_cooling(self, tick: int) -> bool:
        """Whether somebody lost blocks within the last few steps.

        Until it has cooled only sequences that fit to their very end come in; otherwise the one
        that was thrown out would come back at once, be the youngest, and be thrown out again.
        """
        last = self._last_preempt_tick
        return last is not None and tick - last <= _NUM_COOLING_STEPS

    def protect(self, draft: Draft, num_blocks_free: int) -> None:
        """Name victims if the decodes of this step could need more than ``num_blocks_free``.

        Or more than the ceilings of their tenants allow.
        """
        num_blocks_short = draft.flight.num_blocks - num_blocks_free
        # Prefills hold all blocks, none can grow and nobody decodes: the head has to go on.
        is_stuck = self._is_stuck and self._roster.prefills and not draft.flight.num_decodes
        if self._num_refusals or is_stuck:
            draft.is_short = True
            self._name_all(draft)
        elif num_blocks_short > 0:
            draft.is_short = True
            self._name(draft, self._roster.youngest_first(), self._roster.oldest, num_blocks_short)
        for sequences, num_blocks_over in self._tenants.excess(draft.flight.tick):
            oldest = sequences[0]
            draft.flight.over_quota.add(oldest.submission.tenant)
            self._name(draft, reversed(sequences[1:]), oldest, num_blocks_over)
        if is_stuck:
            draft.ask(self._roster.prefills.first, draft.plan.must)

    def observe(self, result: StepResult, tick: int) -> None:
        """Learn from an applied step."""
        if result.preempted_ids:
            self._last_preempt_tick = tick
        has_moved = bool(result.sampled_ids or result.computed_ids)
        if has_moved or result.preempted_ids:
            self._num_refusals = 0
        self._is_stuck = not has_moved and RefusedBecause.POOL_FULL in result.refused_because

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

    def forget(self) -> None:
        """Another executor, another pool."""
        self._num_refusals = 0
        self._is_stuck = False
        self._last_preempt_tick = None

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
        return self._roster.capacity.num_blocks(num_tokens) - sequence.num_shared_tokens // block_size

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
        recovery, num_tail_blocks = self.recovery, 0
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
