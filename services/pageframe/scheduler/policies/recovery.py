"""How a victim's keys and values come back: always one way, or whichever costs least."""

from pageframe.core.plan import Recovery
from pageframe.scheduler.policies.protocols import VictimView


class FixedRecovery:
    """Always the same one, as far as it can be had; else recompute.

    A swap needs a host tier; a tail is what is short, at least a block, and less than the whole.
    """

    def __init__(self, recovery: Recovery) -> None:
        self._recovery = recovery

    def choose(self, victim: VictimView, now_ns: int) -> Recovery:
        """See ``RecoveryPolicy``."""
        can_be_had = victim.costs.of(self._recovery) is not None
        return self._recovery if can_be_had else Recovery.RECOMPUTE


class RecomputeRecovery(FixedRecovery):
    """All blocks go; what nobody takes meanwhile is found again as a prefix hit."""

    def __init__(self) -> None:
        super().__init__(Recovery.RECOMPUTE)


class SwapRecovery(FixedRecovery):
    """The host tier keeps a copy of each block."""

    def __init__(self) -> None:
        super().__init__(Recovery.SWAP)


class TailRecovery(FixedRecovery):
    """Only the last blocks go, as many as are short; it keeps its place and catches up again."""

    def __init__(self) -> None:
        super().__init__(Recovery.TAIL)


class CheapestRecovery:
    """Whichever costs least by the rates that were measured; see ``VictimView.cheapest``.

    A tail is right for few long sequences, where little more will be short before somebody ends;
    for many short ones it would come to the same loss in many pieces.
    """

    def choose(self, victim: VictimView, now_ns: int) -> Recovery:
        """See ``RecoveryPolicy``."""
        return victim.cheapest
