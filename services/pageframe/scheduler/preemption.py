"""Who gives way when the pool runs short, and for how long nobody new comes in after that.

The oldest running sequence is never a victim, and the pool holds any one sequence in full (see
``request.check_fits``), so somebody always gets to the end, and then the next is the oldest.
"""

from pageframe.core.errors import InternalError
from pageframe.core.step import Recovery, RefusedBecause, StepResult
from pageframe.scheduler.budget import Draft
from pageframe.scheduler.roster import Roster

_NUM_COOLING_STEPS = 8
_NUM_REFUSALS_MAX = 8


class Preemption:
    """Chooses victims: recompute, last joined first.

    Which victim frees how much of a shared prefix is the executor's knowledge. It takes victims
    only until the step fits, so naming too many costs a longer message and nothing else; naming
    too few costs a refused plan, after which all are named.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
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
        """Name victims if the decodes of this step could need more than ``num_blocks_free``."""
        num_blocks_short = draft.flight.num_blocks - num_blocks_free
        # Prefills hold all blocks, none can grow and nobody decodes: the head has to go on.
        is_stuck = self._is_stuck and self._roster.prefills and not draft.flight.num_decodes
        if self._num_refusals or is_stuck:
            self._name_all(draft)
        elif num_blocks_short > 0:
            self._name(draft, num_blocks_short)
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

    def _name(self, draft: Draft, num_blocks_short: int) -> None:
        num_blocks = self._roster.capacity.num_blocks
        for victim in self._roster.youngest_first():
            self._add(draft, victim.sequence_id, victim.generation)
            num_blocks_short -= num_blocks(victim.num_computed)
            if num_blocks_short <= 0:
                return

    def _name_all(self, draft: Draft) -> None:
        for victim in self._roster.youngest_first():
            self._add(draft, victim.sequence_id, victim.generation)
        oldest = self._roster.oldest
        if self._num_refusals > 1 and oldest is not None:
            # Even alone it did not fit: somebody unknown holds blocks. Start from nothing.
            self._add(draft, oldest.sequence_id, oldest.generation)

    def _add(self, draft: Draft, sequence_id: int, generation: int) -> None:
        oldest = self._roster.oldest
        assert oldest is not None, f"victim {sequence_id}, but nobody runs"
        draft.flight.beneficiary = oldest
        draft.plan.victims.add(sequence_id, generation, Recovery.RECOMPUTE, oldest.sequence_id)
