"""One scheduler with its executor, as a gateway that has several of them knows it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from pageframe.core.replica import ReplicaFacts
from pageframe.gateway.client import SchedulerLink
from pageframe.gateway.living import OnError


class OpenLink(Protocol):
    """Makes the link to an address."""

    def __call__(
        self,
        address: str,
        *,
        on_change: Callable[[], None],
        on_error: OnError,
        has_others: Callable[[], bool],
    ) -> SchedulerLink:
        """See ``SchedulerLink`` for what it calls."""
        ...


@dataclass(slots=True, eq=False)
class Replica:
    """One scheduler and its executor, as this gateway knows them.

    Attributes:
        name: In metrics, traces and hashes.
        link: The stream to it.
        task: Keeps the link connected.
        handles: Our handle of each request, by the link's.
        full_until_ns: When it may have room again.
        is_leaving: Its address is no longer among those given.
        num_requests: Requests that were sent there.
        num_spills: Requests that would have gone there first, had there been room.
        num_moved: Requests that went on elsewhere because it was lost.
    """

    name: str
    link: SchedulerLink
    task: "asyncio.Task[None]"
    handles: dict[int, int] = field(default_factory=dict)
    full_until_ns: int = 0
    is_leaving: bool = False
    num_requests: int = 0
    num_spills: int = 0
    num_moved: int = 0

    @property
    def is_open(self) -> bool:
        """Whether it is a place for another request."""
        return self.link.is_open and not self.is_leaving

    def serves(self, model: str) -> bool:
        """Whether it serves a model; an empty name stands for any."""
        return any(not model or facts.model == model for facts in self.link.served)


def least_of(facts: Sequence[ReplicaFacts]) -> ReplicaFacts:
    """What every one of several replicas of a model can do, so that a request may go to any."""
    smallest = min(facts, key=lambda entry: entry.num_tokens_fitting(entry.num_blocks))
    return replace(smallest, max_model_len=min(entry.max_model_len for entry in facts))
