"""The four kinds of policy as the scheduler calls them: guarded, checked, with a shadow beside.

Each class has the method of its protocol and asks whoever decides. What an answer has to be, and
when two answers agree, is said here and nowhere else.
"""

from collections.abc import Callable, Sequence

from pageframe.core.plan import Recovery
from pageframe.scheduler.policies.protocols import (
    AdmissionPolicy,
    Key,
    OrderPolicy,
    RecoveryPolicy,
    RoomView,
    TenantView,
    VictimPolicy,
    VictimView,
    WaitingView,
)
from pageframe.scheduler.policies.shadow import Decision


class GuardedOrder:
    """An ``OrderPolicy``.

    What a broken policy has ordered stays as it is, and those who come later are put between by
    numbers of another kind; everybody still comes in.

    Keys of two policies cannot be compared, but what follows from them can: two policies agree when
    whoever is asked for goes before the one asked for last under both, or behind it under both.
    """

    def __init__(self, decision: Decision[OrderPolicy]) -> None:
        self._decision = decision
        self._last_keys: tuple[str, Key, Key] | None = None
        self._last_ranks: tuple[str, Key, Key] | None = None

    def key(self, waiting: WaitingView) -> Key:
        """Place among the waiting of its tenant."""
        plain = self._decision.plain
        if plain is not None:
            return plain.key(waiting)
        key, other = self._decision.ask_both(lambda policy: policy.key(waiting), _fault_of_key)
        if other is not None:
            last = self._last_keys
            if last is not None and last[0] == waiting.tenant:
                self._compare(key < last[1], other < last[2])
            self._last_keys = (waiting.tenant, key, other)
        return key

    def rank(self, head: WaitingView, tenant: TenantView) -> Key:
        """Place of a tenant's first among those of all tenants."""
        plain = self._decision.plain
        if plain is not None:
            return plain.rank(head, tenant)
        key, other = self._decision.ask_both(
            lambda policy: policy.rank(head, tenant), _fault_of_key
        )
        if other is not None:
            last = self._last_ranks
            if last is not None and last[0] != tenant.tenant:
                self._compare(key < last[1], other < last[2])
            self._last_ranks = (tenant.tenant, key, other)
        return key

    def _compare(self, goes_first: bool, goes_first_too: bool) -> None:
        self._decision.compare(_word(goes_first), _word(goes_first_too))


class GuardedAdmission:
    """An ``AdmissionPolicy``."""

    def __init__(self, decision: Decision[AdmissionPolicy]) -> None:
        self._decision = decision

    def admits(self, waiting: WaitingView, room: RoomView) -> bool:
        """Whether it comes in now."""
        plain = self._decision.plain
        if plain is not None:
            return plain.admits(waiting, room)
        return self._decision.ask(
            lambda policy: policy.admits(waiting, room),
            _fault_of_verdict,
            lambda admits: f"{'admit' if admits else 'hold back'} sequence {waiting.sequence_id}",
        )


class GuardedVictim:
    """A ``VictimPolicy``. Two orders agree when they name the same first victim."""

    def __init__(self, decision: Decision[VictimPolicy]) -> None:
        self._decision = decision

    def order(self, candidates: Sequence[VictimView], now_ns: int) -> Sequence[int]:
        """Ids of candidates, first victim first, none twice."""
        return self._decision.ask(
            lambda policy: list(policy.order(candidates, now_ns)),
            _fault_of_order(candidates),
            lambda answer: str(answer[0] if answer else 0),
        )


class GuardedRecovery:
    """A ``RecoveryPolicy``."""

    def __init__(self, decision: Decision[RecoveryPolicy]) -> None:
        self._decision = decision

    def choose(self, victim: VictimView, now_ns: int) -> Recovery:
        """One of the recoveries for which ``victim.costs`` has a number."""
        return self._decision.ask(
            lambda policy: policy.choose(victim, now_ns),
            _fault_of_recovery(victim),
            lambda answer: answer.name.lower(),
        )


def _word(goes_first: bool) -> str:
    return "before" if goes_first else "behind"


def _fault_of_key(answer: object) -> str:
    is_key = isinstance(answer, tuple) and all(isinstance(part, int) for part in answer)
    return "" if is_key else f"{answer!r} is no tuple of whole numbers"


def _fault_of_verdict(answer: object) -> str:
    return "" if isinstance(answer, bool) else f"{answer!r} is neither True nor False"


def _fault_of_order(candidates: Sequence[VictimView]) -> Callable[[list[int]], str]:
    def fault_of(answer: list[int]) -> str:
        if len(set(answer)) < len(answer):
            return f"{answer} names somebody twice"
        strangers = set(answer) - {view.sequence_id for view in candidates}
        return f"{sorted(strangers)} are no candidates" if strangers else ""

    return fault_of


def _fault_of_recovery(victim: VictimView) -> Callable[[object], str]:
    def fault_of(answer: object) -> str:
        if not isinstance(answer, Recovery):
            return f"{answer!r} is no recovery"
        can_be_had = victim.costs.of(answer) is not None
        return "" if can_be_had else f"{answer.name.lower()} cannot be had"

    return fault_of
