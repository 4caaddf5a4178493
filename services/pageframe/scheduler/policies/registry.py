"""Policies by name: built-in ones, and those that other packages bring as entry points.

    group       entry points                       setting
    order       pageframe.order_policies           order-policy
    admission   pageframe.admission_policies       admission-policy
    victim      pageframe.victim_policies          victim-policy
    recovery    pageframe.recovery_policies        recovery

An entry point is a callable without arguments that returns a policy; see ``protocols``.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.scheduler.policies.admission import ConservativeAdmission, WatermarkAdmission
from pageframe.scheduler.policies.order import FairOrder, FirstComeOrder, PrefixAwareOrder
from pageframe.scheduler.policies.protocols import (
    AdmissionPolicy,
    OrderPolicy,
    RecoveryPolicy,
    VictimPolicy,
)
from pageframe.scheduler.policies.recovery import (
    CheapestRecovery,
    RecomputeRecovery,
    SwapRecovery,
    TailRecovery,
)
from pageframe.scheduler.policies.victim import CheapestVictim, YoungestVictim

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Group(Generic[P]):
    """Policies that answer the same questions.

    Attributes:
        name: In settings, spans and messages.
        default: Decides where nobody says otherwise, and in place of one that broke.
        methods: What a policy must have.
        built_in: Ours, found without the metadata of an installation.
    """

    name: str
    default: str
    methods: tuple[str, ...]
    built_in: dict[str, Callable[[], P]]

    @property
    def entry_points(self) -> str:
        """The entry point group."""
        return f"pageframe.{self.name}_policies"


ORDER: Group[OrderPolicy] = Group(
    name="order",
    default="fair",
    methods=("key", "rank"),
    built_in={"fair": FairOrder, "fcfs": FirstComeOrder, "prefix-aware": PrefixAwareOrder},
)
ADMISSION: Group[AdmissionPolicy] = Group(
    name="admission",
    default="watermark",
    methods=("admits",),
    built_in={"watermark": WatermarkAdmission, "conservative": ConservativeAdmission},
)
VICTIM: Group[VictimPolicy] = Group(
    name="victim",
    default="cheapest",
    methods=("order",),
    built_in={"cheapest": CheapestVictim, "youngest": YoungestVictim},
)
RECOVERY: Group[RecoveryPolicy] = Group(
    name="recovery",
    default="auto",
    methods=("choose",),
    built_in={
        "auto": CheapestRecovery,
        "recompute": RecomputeRecovery,
        "swap": SwapRecovery,
        "tail": TailRecovery,
    },
)
GROUPS: dict[str, Group[Any]] = {
    group.name: group for group in (ORDER, ADMISSION, VICTIM, RECOVERY)
}
"""All groups by name."""


def load(group: Group[P], name: str) -> P:
    """A new policy of this name.

    Raises:
        InvalidRequestError: POLICY_UNKNOWN; the message lists what is installed.
        PreconditionError: POLICY_BROKEN; an installed one cannot be made.
    """
    make = group.built_in.get(name)
    if make is not None:
        return make()
    installed = importlib.metadata.entry_points(group=group.entry_points)
    if name not in installed.names:
        known = ", ".join(sorted({*group.built_in, *installed.names}))
        raise InvalidRequestError(
            "POLICY_UNKNOWN",
            f"{group.name} policy {name!r} is unknown; installed are {known}",
            group=group.name,
            policy=name,
            installed=known,
        )
    return _make_installed(group, installed[name])


def _make_installed(group: Group[P], point: importlib.metadata.EntryPoint) -> P:
    try:
        policy: P = point.load()()
    except Exception as error:  # Whatever foreign code raises, the setting is what to look at.
        raise _broken(group, point, f"{type(error).__name__}: {error}") from error
    lacking = [name for name in group.methods if not callable(getattr(policy, name, None))]
    if lacking:
        raise _broken(group, point, f"{type(policy).__name__} lacks {', '.join(lacking)}")
    return policy


def _broken(group: Group[P], point: importlib.metadata.EntryPoint, why: str) -> PreconditionError:
    return PreconditionError(
        "POLICY_BROKEN",
        f"{group.name} policy {point.name!r} from {point.value} cannot be made: {why}",
        group=group.name,
        policy=point.name,
        entry_point=point.value,
    )
