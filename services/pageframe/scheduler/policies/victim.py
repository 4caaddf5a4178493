"""Who gives way first when blocks run short."""

from collections.abc import Sequence

from pageframe.scheduler.policies.protocols import VictimView

_NUM_STEPS_REMEMBERED = 256


class YoungestVictim:
    """Last joined, first out: the victim of a stack, as of vLLM and the paper it comes from."""

    def order(self, candidates: Sequence[VictimView], now_ns: int) -> list[int]:
        """See ``VictimPolicy``."""
        return [view.sequence_id for view in sorted(candidates, key=_by_youth)]


class CheapestVictim:
    """Least urgent first; of equals, the least time to get back for each block that is needed soon.

    Who gave way lately counts as dearer, twice for the first time and so on, and less so as steps
    go by: two that cost the same take turns instead of one being thrown out again and again. Who
    waits for blocks already, with its tail gone, goes before all others, for it moves nowhere.
    """

    def order(self, candidates: Sequence[VictimView], now_ns: int) -> list[int]:
        """See ``VictimPolicy``."""
        return [view.sequence_id for view in sorted(candidates, key=_by_cost)]


def _by_youth(view: VictimView) -> int:
    return -view.join_number


def _by_cost(view: VictimView) -> tuple[bool, int, float, int]:
    cost_ns = view.block_ns * _dearness(view)
    return (not view.has_lost_tail, view.priority, cost_ns, -view.join_number)


def _dearness(view: VictimView) -> float:
    """By how much somebody who gave way lately counts as dearer; at least 1."""
    if view.num_steps_since_preempted < 0:
        return 1.0
    left = 1 - view.num_steps_since_preempted / _NUM_STEPS_REMEMBERED
    return 1 + view.num_preemptions * max(0.0, left)
