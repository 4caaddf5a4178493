"""Who gives way first when blocks run short."""

from collections.abc import Sequence

from pageframe.scheduler.policies.protocols import VictimView

_NUM_STEPS_REMEMBERED = 32
# An estimate is a guess: what costs less than this many times the least is as good.
_ALIKE = 2.0


class YoungestVictim:
    """Last joined, first out: the victim of a stack, as of vLLM and the paper it comes from."""

    def order(self, candidates: Sequence[VictimView], now_ns: int) -> list[int]:
        """See ``VictimPolicy``."""
        return [view.sequence_id for view in sorted(candidates, key=_by_youth)]


class CheapestVictim:
    """Least urgent first; of equals, the least time to get back for each block that is needed soon.

    Of those that cost about the same the youngest goes: it is the last to end anyway, and taking
    turns instead would keep everybody half done.

    Who gave way lately counts as dearer by one time its price for each time it did, for some steps:
    somebody else has to be much dearer for it to be thrown out again at once. Who waits for blocks
    already, with its tail gone, goes before all others, for it moves nowhere.
    """

    def order(self, candidates: Sequence[VictimView], now_ns: int) -> list[int]:
        """See ``VictimPolicy``."""
        prices = {view.sequence_id: view.block_ns * _dearness(view) for view in candidates}
        bound_ns = _ALIKE * min(prices.values(), default=0.0)

        def place(view: VictimView) -> tuple[bool, int, float, int]:
            price_ns = prices[view.sequence_id]
            price_ns = 0.0 if price_ns <= bound_ns else price_ns
            return (not view.has_lost_tail, view.priority, price_ns, -view.join_number)

        return [view.sequence_id for view in sorted(candidates, key=place)]


def _by_youth(view: VictimView) -> int:
    return -view.join_number


def _dearness(view: VictimView) -> int:
    """By how much somebody who gave way lately counts as dearer; at least 1."""
    is_lately = 0 <= view.num_steps_since_preempted < _NUM_STEPS_REMEMBERED
    return 1 + view.num_preemptions if is_lately else 1
