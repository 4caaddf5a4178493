"""Whom policies may choose as victims, what they are told of them, and what they may answer."""

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import NamedTuple

from pageframe.core.plan import Recovery
from pageframe.core.replica import ReplicaFacts
from pageframe.scheduler.getting_back import GettingBack
from pageframe.scheduler.policies.chosen import Policies
from pageframe.scheduler.policies.protocols import Costs, VictimView
from pageframe.scheduler.rates import Rates
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Sequence

NUM_CANDIDATES_MAX = 16
"""So many are looked at together, from the youngest on: a plan must not cost more because more run.
The next ones are looked at when these do not free enough."""


class Shortage(NamedTuple):
    """Why somebody has to give way.

    Attributes:
        tick: In which step.
        now_ns: When it is planned.
        num_blocks: Blocks that are short in it; 0 when all that can be had are wanted.
        num_blocks_soon: Blocks that will be within a few steps, at least ``num_blocks``.
    """

    tick: int
    now_ns: int
    num_blocks: int
    num_blocks_soon: int

    def num_tail_blocks(self, num_blocks: int) -> int:
        """How many of its ``num_blocks`` a victim gives up that keeps some.

        As many as are short soon, so that it need not give way again at once.
        """
        return self.num_blocks_soon if self.num_blocks_soon < num_blocks else self.num_blocks

    def less(self, num_blocks: int) -> "Shortage":
        """What is left of it when somebody has given up so many."""
        return self._replace(
            num_blocks=self.num_blocks - num_blocks,
            num_blocks_soon=self.num_blocks_soon - num_blocks,
        )


class Candidates:
    """Asks the policies of the groups ``victim`` and ``recovery``.

    Args:
        roster: Who runs.
        rates: What getting something back costs.
        policies: Whom to ask.
    """

    def __init__(self, roster: Roster, rates: Rates, policies: Policies) -> None:
        self._roster = roster
        self._policies = policies
        self._getting_back = GettingBack(roster, rates)
        self._has_host_tier = False

    def restart(self, facts: ReplicaFacts) -> None:
        """Another executor, perhaps without a host tier."""
        self._has_host_tier = facts.num_host_blocks > 0

    def ranked(self, youngest_first: Iterable[Sequence], shortage: Shortage) -> Iterator[Sequence]:
        """``youngest_first`` in the order of the victim policy, few at a time.

        Whatever that says, those of tenants that take more than their part stay ahead of others.
        """
        above = self._roster.shares_above
        for _, alike in groupby(youngest_first, lambda sequence: sequence.share in above):
            while chosen := list(islice(alike, NUM_CANDIDATES_MAX)):
                by_id = {sequence.sequence_id: sequence for sequence in chosen}
                if len(chosen) > 1:
                    views = tuple(self._view(each, shortage) for each in chosen)
                    for sequence_id in self._policies.victim.order(views, shortage.now_ns):
                        yield by_id.pop(sequence_id)
                yield from by_id.values()

    def recovery_of(self, victim: Sequence, shortage: Shortage) -> tuple[Recovery, int, Costs]:
        """How ``victim`` comes back, the blocks of its tail, and what each way would cost in all.

        The tail is 0 blocks unless it comes back that way. What it lacks already, because it has
        not caught up since it last gave way, is in the costs; policies are told without.
        """
        view = self._view(victim, shortage)
        recovery = self._policies.recovery.choose(view, shortage.now_ns)
        is_tail = recovery is Recovery.TAIL
        num_tail_blocks = shortage.num_tail_blocks(view.num_blocks) if is_tail else 0
        costs = self._costs(victim, view.num_blocks, shortage.num_tail_blocks(view.num_blocks))
        return recovery, num_tail_blocks, costs

    def num_own_blocks(self, sequence: Sequence) -> int:
        """Blocks that come free with it, as far as it shares none of the others."""
        num_tokens = max(sequence.num_computed, sequence.num_shared_tokens)
        capacity = self._roster.capacity
        if sequence.search is not None:
            return sequence.search.num_blocks(capacity)
        num_shared_blocks = capacity.num_shared_blocks(sequence.num_shared_tokens)
        return capacity.num_blocks_held(num_tokens) - num_shared_blocks

    def _view(self, sequence: Sequence, shortage: Shortage) -> VictimView:
        submission = sequence.submission
        last_tick = sequence.preempt_tick
        num_blocks = self.num_own_blocks(sequence)
        return VictimView(
            sequence_id=sequence.sequence_id,
            tenant=submission.tenant,
            priority=submission.priority,
            join_number=sequence.join_number,
            num_computed_tokens=sequence.num_computed,
            num_output_tokens_left=submission.sampling.max_tokens - len(sequence.output),
            num_blocks=num_blocks,
            num_blocks_short=shortage.num_blocks,
            num_blocks_soon=shortage.num_blocks_soon,
            num_preemptions=sequence.num_preemptions,
            num_steps_since_preempted=-1 if last_tick is None else shortage.tick - last_tick,
            has_lost_tail=sequence.has_lost_tail,
            costs=self._more(sequence, num_blocks, shortage.num_tail_blocks(num_blocks)),
        )

    def _more(self, sequence: Sequence, num_blocks: int, num_tail_blocks: int) -> Costs:
        """What giving way adds to what ``sequence`` has to get back anyway."""
        costs = self._costs(sequence, num_blocks, num_tail_blocks)
        if sequence.loss is None:
            return costs
        lacking_ns = self._getting_back.by_computing_ns(sequence, sequence.num_computed)
        return costs.less(lacking_ns)

    def _costs(self, sequence: Sequence, num_blocks: int, num_tail_blocks: int) -> Costs:
        """What each way back costs in all; a tail is at least a block and less than the whole.

        0                       kept                   num_computed
        [────── own, kept ──────)[── its tail ──)
                                       ╰ its last block may be begun only
        """
        capacity, back = self._roster.capacity, self._getting_back
        swap_ns = back.by_swap_ns(sequence) if self._has_host_tier else None
        tail_ns = None
        if 0 < num_tail_blocks < num_blocks:
            num_kept_blocks = capacity.num_blocks(sequence.num_computed) - num_tail_blocks
            num_kept = num_kept_blocks // capacity.num_kv_groups * capacity.block_size
            tail_ns = back.by_computing_ns(sequence, num_kept)
        return Costs(back.by_finding_ns(sequence), swap_ns, tail_ns)
