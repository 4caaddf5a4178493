"""The decisions of one scheduler, as its options name them."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

from pageframe.core.clock import Clock
from pageframe.core.errors import InvalidRequestError
from pageframe.scheduler.policies.guard import PolicyFault
from pageframe.scheduler.policies.guarded import (
    GuardedAdmission,
    GuardedOrder,
    GuardedRecovery,
    GuardedVictim,
)
from pageframe.scheduler.policies.registry import (
    ADMISSION,
    GROUPS,
    ORDER,
    RECOVERY,
    VICTIM,
    Group,
    load,
)
from pageframe.scheduler.policies.shadow import Decision, Disagreement

P = TypeVar("P")


class PolicyWitness(Protocol):
    """Hears what becomes of policies."""

    def on_fault(self, fault: PolicyFault) -> None:
        """A policy is asked no more; told once of each."""
        ...

    def on_disagreement(self, disagreement: Disagreement) -> None:
        """An answer of a shadow differs."""
        ...


class PolicyCount(NamedTuple):
    """What became of one group: who decides now, who looks on, and how often they differed."""

    group: str
    name: str
    shadow_name: str
    num_answers: int
    num_disagreements: int


class Policies:
    """Who decides what.

    Args:
        names: A policy by group; the default where a group is left out.
        shadows: Likewise; nobody where a group is left out.
        clock: Times foreign policies.
        witness: Hears what becomes of them.

    Attributes:
        order: In which order waiting sequences are looked at.
        admission: Who comes in.
        victim: Who gives way.
        recovery: How victims come back.

    Raises:
        InvalidRequestError: POLICY_UNKNOWN or POLICY_GROUP_UNKNOWN.
        PreconditionError: POLICY_BROKEN.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        shadows: Mapping[str, str],
        *,
        clock: Clock,
        witness: PolicyWitness,
    ) -> None:
        check_names(names, shadows)
        self._names = names
        self._shadows = shadows
        self._clock = clock
        self._witness = witness
        order, admission = self._decision(ORDER), self._decision(ADMISSION)
        victim, recovery = self._decision(VICTIM), self._decision(RECOVERY)
        self._decisions: tuple[Decision[Any], ...] = (order, admission, victim, recovery)
        self.order = GuardedOrder(order)
        self.admission = GuardedAdmission(admission)
        self.victim = GuardedVictim(victim)
        self.recovery = GuardedRecovery(recovery)

    def counts(self) -> tuple[PolicyCount, ...]:
        """One entry per group."""
        return tuple(
            PolicyCount(
                decision.group_name,
                decision.name,
                decision.shadow_name,
                decision.num_answers,
                decision.num_disagreements,
            )
            for decision in self._decisions
        )

    def _decision(self, group: Group[P]) -> Decision[P]:
        return Decision(
            group,
            self._names.get(group.name, group.default),
            shadow_name=self._shadows.get(group.name, ""),
            clock=self._clock,
            on_fault=self._witness.on_fault,
            on_disagreement=self._witness.on_disagreement,
        )


def check_names(names: Mapping[str, str], shadows: Mapping[str, str]) -> None:
    """Make sure that every policy that is named can be made; see ``Policies``.

    Raises:
        InvalidRequestError: POLICY_UNKNOWN or POLICY_GROUP_UNKNOWN.
        PreconditionError: POLICY_BROKEN.
    """
    for group_name, name in (*names.items(), *shadows.items()):
        if group_name not in GROUPS:
            known = ", ".join(sorted(GROUPS))
            raise InvalidRequestError(
                "POLICY_GROUP_UNKNOWN",
                f"there are no {group_name!r} policies; groups are {known}",
                group=group_name,
                groups=known,
            )
        load(GROUPS[group_name], name)
