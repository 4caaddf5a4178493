"""What a policy is asked, what it may see, and what it may answer.

    group       asked                                              answers
    order       when a sequence begins to wait; which tenant next   a key, smallest first
    admission   may this one come in, given what is left            yes or no
    victim      blocks are short: who gives way first               ids, first victim first
    recovery    how does this victim come back                      one of its costs' recoveries

A policy decides and nothing else: it sees the views of this module, which are frozen copies, and no
part of the scheduler. It has no clock but the ``now_ns`` that it is handed, waits for nothing, and
keeps whatever state of its own it likes. Equal questions in equal order must get equal answers, or
a recorded run cannot be replayed.

Others are found by entry point, see ``registry``; every call of them passes ``guard``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from pageframe.core.plan import Recovery

Key = tuple[int, ...]
"""Place in an order, smallest first. Whole numbers only: two keys always compare."""


class WaitingView(NamedTuple):
    """A sequence that waits to come in, for the first time or again.

    Attributes:
        sequence_id: Rises with arrival.
        tenant: Whose.
        priority: As submitted; higher is more urgent.
        submit_ns: When it came.
        deadline_ns: When it is too late; 0 for never.
        num_tokens: Prompt and output known so far.
        num_output_tokens_max: Output tokens that it may still get.
        num_cached_tokens: Expected to be found in memory, less than ``num_tokens``.
        num_preemptions: How often it lost blocks.
        turn_ns: When it is its turn by age and priority: ``submit_ns``, less the setting
            ``priority-ageing`` for each level of priority. Smaller is more urgent.
        has_run: Whether it comes again; among those of one tenant such go first in any case.
        prefix_group: Equal for prompts that begin with the same tokens, and else most likely not.
    """

    sequence_id: int
    tenant: str
    priority: int
    submit_ns: int
    deadline_ns: int
    num_tokens: int
    num_output_tokens_max: int
    num_cached_tokens: int
    num_preemptions: int
    turn_ns: int = 0
    has_run: bool = False
    prefix_group: int = 0


class TenantView(NamedTuple):
    """A tenant that has somebody waiting.

    Attributes:
        tenant: Its name.
        weight: Its share is ``weight`` divided by the weights of all who want something.
        virtual_time: Tokens served to it divided by its weight; a tenant that comes back from
            being idle starts where the others are.
        num_running: Its sequences that run.
        num_waiting: Its sequences that wait.
    """

    tenant: str
    weight: float
    virtual_time: float
    num_running: int
    num_waiting: int


class RoomView(NamedTuple):
    """What would be left of the step that is being planned, once the one asked about is in.

    Attributes:
        num_blocks_total: Blocks of the pool.
        num_blocks_left: Blocks promised to nobody once its known tokens have theirs, and each of
            its samples one; at least 0.
        num_blocks_more: Blocks that it takes from there to its last token.
        num_blocks_watermark: One in a hundred of the pool, rounded up.
        num_blocks_growth: Blocks that running sequences take if each comes to its last token, at
            most: what they share is counted for each.
        num_tokens_left: Of the token budget, before its chunk.
        num_running: Sequences that run, admissions of this plan included, itself not.
        max_num_running: Most that may.
        is_cooling: Whether somebody lost blocks within the last few steps.
    """

    num_blocks_total: int
    num_blocks_left: int
    num_blocks_more: int
    num_blocks_watermark: int
    num_blocks_growth: int
    num_tokens_left: int
    num_running: int
    max_num_running: int
    is_cooling: bool


class Costs(NamedTuple):
    """What it takes to get a victim's keys and values back, by recovery; nanoseconds.

    Time of the device that nothing else can have; ``None`` where the recovery cannot be had. See
    ``rates`` for how the numbers come about.
    """

    recompute_ns: int
    swap_ns: int | None
    tail_ns: int | None

    def of(self, recovery: Recovery) -> int | None:
        """The cost of one recovery."""
        if recovery is Recovery.SWAP:
            return self.swap_ns
        return self.tail_ns if recovery is Recovery.TAIL else self.recompute_ns

    def less(self, paid_ns: int) -> "Costs":
        """Each cost without ``paid_ns``, and not below 0."""
        swap_ns, tail_ns = self.swap_ns, self.tail_ns
        return Costs(
            recompute_ns=max(0, self.recompute_ns - paid_ns),
            swap_ns=None if swap_ns is None else max(0, swap_ns - paid_ns),
            tail_ns=None if tail_ns is None else max(0, tail_ns - paid_ns),
        )


class VictimView(NamedTuple):
    """A running sequence that may have to give blocks up.

    Attributes:
        sequence_id: Its id.
        tenant: Whose.
        priority: As submitted.
        join_number: Rises with each admission: the largest joined last.
        num_computed_tokens: Tokens that it would lose, or part of them.
        num_output_tokens_left: Output tokens that it may still get.
        num_blocks: Blocks that come free with all of it; shared ones are left out.
        num_blocks_short: Blocks that are lacking when it is asked for.
        num_blocks_soon: Blocks that will be, within a few steps, if nobody comes to an end.
        num_preemptions: How often it lost blocks.
        num_steps_since_preempted: Steps since it last did; -1 for never.
        has_lost_tail: Whether it waits for blocks already, having given up its last ones.
        costs: Of getting it back.
    """

    sequence_id: int
    tenant: str
    priority: int
    join_number: int
    num_computed_tokens: int
    num_output_tokens_left: int
    num_blocks: int
    num_blocks_short: int
    num_blocks_soon: int
    num_preemptions: int
    num_steps_since_preempted: int
    has_lost_tail: bool
    costs: Costs

    @property
    def cheapest(self) -> Recovery:
        """The recovery that costs least; of equals the first of recompute, swap, tail.

        A tail is out of the question where it would be all of the victim soon: one tail would
        follow another, and what is left would be held for nothing.
        """
        recoveries = [Recovery.RECOMPUTE, Recovery.SWAP]
        if self.num_blocks_soon < self.num_blocks:
            recoveries.append(Recovery.TAIL)
        return min(recoveries, key=self._cost_ns)

    @property
    def block_ns(self) -> float:
        """Least cost of giving up the whole, for each block of it that is needed soon."""
        cost_ns = min(self._cost_ns(Recovery.RECOMPUTE), self._cost_ns(Recovery.SWAP))
        return cost_ns / max(1, min(self.num_blocks, self.num_blocks_soon))

    def _cost_ns(self, recovery: Recovery) -> float:
        cost_ns = self.costs.of(recovery)
        return math.inf if cost_ns is None else cost_ns


class OrderPolicy(Protocol):
    """In which order waiting sequences are looked at.

    Sequences are kept apart by tenant: ``key`` orders those of one tenant, ``rank`` the first ones
    of all tenants. Of equals the one that came first goes first.
    """

    def key(self, waiting: WaitingView) -> Key:
        """Place among the waiting of its tenant; asked once, when it begins to wait."""
        ...

    def rank(self, head: WaitingView, tenant: TenantView) -> Key:
        """Place of a tenant's first among those of all tenants.

        Asked again when the tenant was served, or has another first one; the cheaper the better.
        """
        ...


class AdmissionPolicy(Protocol):
    """Whether a sequence for which there is room in this step may take it.

    Asked only for one whose known tokens fit into what is promised to nobody, so an answer cannot
    promise a block twice; and only while somebody runs, so an answer cannot keep all out for ever.
    """

    def admits(self, waiting: WaitingView, room: RoomView) -> bool:
        """Whether it comes in now; who does not holds back those behind it."""
        ...


class VictimPolicy(Protocol):
    """Who gives way when blocks run short.

    The candidates are a bounded choice of the running, youngest first. The oldest running sequence,
    and whoever is older than the one that needs the blocks, is never among them.
    """

    def order(self, candidates: Sequence[VictimView], now_ns: int) -> Sequence[int]:
        """Ids of candidates, first victim first, none twice.

        As many are named as may be needed; those left out come after the others, youngest first.
        """
        ...


class RecoveryPolicy(Protocol):
    """How a victim's keys and values come back."""

    def choose(self, victim: VictimView, now_ns: int) -> Recovery:
        """One of the recoveries for which ``victim.costs`` has a number."""
        ...
