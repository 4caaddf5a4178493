"""Several replicas behind one gateway: where each request goes, and where it goes on.

    submit ─▶ routing ─▶ link of a replica ══▶ scheduler
                 ▲            │ is lost, or refuses
                 └────────────┘ the request moves, with the tokens it has

A gateway remembers nothing of where requests went: every one finds the same replica for the same
prefix or session (``routing``). The tokens themselves go from a link straight into the request's
mailbox; nothing here is done for a token. With one replica there is nothing to choose, and a
request waits for it when it is lost.
"""

import asyncio
import contextlib
import functools
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from pageframe.core.clock import Clock
from pageframe.core.errors import PageframeError, UnavailableError
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Submission
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.gateway.living import Living
from pageframe.gateway.mailbox import Mailbox
from pageframe.gateway.replica import OpenLink, Replica, least_of
from pageframe.gateway.routing import (
    Place,
    RoutingOptions,
    choose,
    prefix_key,
    rendezvous_order,
    session_key,
)
from pageframe.rpc.addresses import ReplicaAddresses, short_name
from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import Reading

_log = structlog.get_logger(__name__)


_FULL_S: Final = 1.0
# A gateway that starts beside its replicas should not send everything to the one that is first.
_GATHER_S: Final = 2.0
_NUM_HANDLES_KNOWN_MAX: Final = 4096

# Refusals that speak of the replica, not of the request.
_NO_ROOM: Final = frozenset({"QUEUE_FULL", "DRAINING", "NO_EXECUTOR"})
_NOT_THERE: Final = "HANDLE_UNKNOWN"


@dataclass(slots=True)
class _Placed:
    """Where a request is: with which replica, under which handle; and who refused it there."""

    replica: Replica
    handle: int
    refused_by: set[str] = field(default_factory=set)


class ReplicaSet:
    """The link to all schedulers. For one event loop; ``run`` keeps it connected.

    Args:
        addresses: Where they are.
        open_link: Makes a link.
        options: Of routing.
        clock: Source of time.
    """

    def __init__(
        self,
        addresses: ReplicaAddresses,
        open_link: OpenLink,
        options: RoutingOptions,
        clock: Clock,
    ) -> None:
        self._addresses = addresses
        self._open_link = open_link
        self._options = options
        self._clock = clock
        self._replicas: dict[str, Replica] = {}
        self._placed: dict[int, _Placed] = {}
        self._handles = itertools.count(1)
        self._served: tuple[ReplicaFacts, ...] = ()
        self._homes: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._changed = asyncio.Event()

    @property
    def served(self) -> tuple[ReplicaFacts, ...]:
        """What is served, one for each model; of several replicas, what all of them can do."""
        return self._served

    @property
    def facts(self) -> ReplicaFacts:
        """What the first replica serves.

        Raises:
            UnavailableError: reason NOT_READY, before the first hello.
        """
        if not self._served:
            raise UnavailableError("NOT_READY", "no scheduler has answered yet; try again")
        return self._served[0]

    @property
    def replicas(self) -> list[Replica]:
        """All of them, in the order of their addresses."""
        return list(self._replicas.values())

    async def wait_ready(self) -> None:
        """Wait for the first replica, and then a moment for the others."""
        while not self._served:
            await self._change()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GATHER_S):
                while not all(replica.is_open for replica in self.replicas):
                    await self._change()

    async def run(self) -> None:
        """Stay connected to all of them until cancelled."""
        try:
            while True:
                self._keep(await self._addresses.find())
                due = asyncio.create_task(self._addresses.wait_due())
                tasks = [due, *(replica.task for replica in self.replicas)]
                try:
                    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    due.cancel()
                for task in done:
                    task.result()
        finally:
            tasks = [replica.task for replica in self.replicas]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def submit(self, submission: Submission, mailbox: Mailbox) -> int:
        """Send a request to the replica it belongs to; returns its handle.

        Raises:
            UnavailableError: reason SCHEDULER_LOST, when there has been none for too long, or
                NOT_READY.
        """
        replica = self._find_open(submission) or self._find_known(submission)
        number = replica.link.submit(submission, mailbox)
        handle = next(self._handles)
        self._placed[handle] = _Placed(replica, number)
        self._note_placed(handle, number, replica, mailbox)
        return handle

    def cancel(self, handle: int, sample_index: int | None = None) -> None:
        """Take back a request, or one of its samples, from wherever it is now."""
        placed = self._placed.get(handle)
        if placed is None:
            return
        if sample_index is None:
            del self._placed[handle]
            placed.replica.handles.pop(placed.handle, None)
        placed.replica.link.cancel(placed.handle, sample_index)

    def count(self) -> tuple[int, int]:
        """How many replicas take requests, and how many there are."""
        return sum(replica.is_open for replica in self.replicas), len(self._replicas)

    def readings(self) -> Iterator[Reading]:
        """What is counted here, for metrics."""
        for replica in self.replicas:
            labels = (replica.name,)
            yield Reading(metrics.REPLICA_HEALTHY, int(replica.is_open), labels)
            yield Reading(metrics.REPLICA_REQUESTS, replica.num_requests, labels)
            yield Reading(metrics.REPLICA_SPILLS, replica.num_spills, labels)
            yield Reading(metrics.REPLICA_MOVED, replica.num_moved, labels)

    def _keep(self, addresses: Sequence[str]) -> None:
        """Begin with the replicas that are new; leave those that are gone once they are idle."""
        for address in addresses:
            if address not in self._replicas:
                self._replicas[address] = self._begin(address)
        for address, replica in list(self._replicas.items()):
            replica.is_leaving = address not in addresses
            if replica.is_leaving and not replica.link.num_living:
                del self._replicas[address]
                replica.task.cancel()
        self._on_change()

    def _begin(self, address: str) -> Replica:
        name = short_name(address)
        if any(replica.name == name for replica in self.replicas):
            name = address
        refused = functools.partial(self._take_over, address)
        link = self._open_link(
            address,
            on_change=self._on_change,
            on_error=refused,
            has_others=lambda: sum(replica.is_open for replica in self.replicas) > 1,
        )
        _log.info("replica_added", replica=name, address=address)
        return Replica(name, link, asyncio.create_task(link.run()))

    def _find_open(
        self, submission: Submission, excluded: set[str] | None = None
    ) -> Replica | None:
        """The open replica that a request goes to, of those that are not ``excluded``."""
        found = {
            replica.name: replica
            for replica in self._replicas.values()
            if replica.is_open
            and replica.serves(submission.model)
            and replica.name not in (excluded or ())
        }
        if len(found) < 2:
            return next(iter(found.values()), None)
        home = self._homes.get((submission.tenant, submission.prefix_handle))
        if home in found:
            return found[home]
        order = rendezvous_order(self._key(submission), list(found))
        if submission.session_id:
            # Its blocks are kept there: a place in line is worth more than room elsewhere.
            return found[order[0]]
        now_ns = self._clock.now_ns()
        places = [
            Place(name, found[name].link.num_living, found[name].full_until_ns > now_ns)
            for name in order
        ]
        chosen = choose(places, self._options).name
        if chosen != order[0]:
            found[order[0]].num_spills += 1
        return found[chosen]

    def _find_known(self, submission: Submission) -> Replica:
        """The replica that a request waits for when none is open: one that is not given up."""
        known = {
            replica.name: replica
            for replica in self._replicas.values()
            if replica.serves(submission.model)
        }
        if not known:
            raise UnavailableError("NOT_READY", "no scheduler has answered yet; try again")
        order = rendezvous_order(self._key(submission), list(known))
        return known[min(order, key=lambda name: known[name].link.is_lost)]

    def _key(self, submission: Submission) -> bytes:
        if submission.session_id:
            return session_key(submission.cache_salt, submission.session_id)
        return prefix_key(
            submission.cache_salt, submission.prompt_token_ids, self._options.num_prefix_tokens
        )

    def _take_over(self, address: str, living: Living, error: PageframeError) -> bool:
        """A replica refuses a request, or fails it; whether it goes on elsewhere.

        One that has nothing yet tries one other replica, and one that names a retained prefix all
        of them. One that a lost replica left behind waits for that one when nobody else has room.
        """
        if error.reason not in _NO_ROOM and error.reason != _NOT_THERE:
            return False
        replica = self._replicas.get(address)
        handle = None if replica is None else replica.handles.get(living.submission.handle)
        placed = None if handle is None else self._placed.get(handle)
        if replica is None or handle is None or placed is None:
            return False
        if error.reason in _NO_ROOM:
            replica.full_until_ns = self._clock.now_ns() + round(_FULL_S * NANOSECONDS_PER_SECOND)
        placed.refused_by.add(replica.name)
        is_moved = bool(living.mailbox.lost_ns) or any(living.token_ids)
        target = None
        if is_moved or error.reason == _NOT_THERE or len(placed.refused_by) == 1:
            target = self._find_open(living.submission, placed.refused_by)
        if target is None and is_moved:
            target = self._find_away(living.submission)
            asyncio.get_running_loop().call_later(_FULL_S, self._on_change)
        if target is None:
            return False
        # What was refused at once has been counted against nobody's bounds.
        living.is_sent = is_moved
        self._move(handle, placed, target)
        return True

    def _find_away(self, submission: Submission) -> Replica | None:
        """A replica that may come back and take what it had."""
        away = (
            replica
            for replica in self._replicas.values()
            if replica.serves(submission.model)
            and not (replica.link.is_running or replica.link.is_lost)
        )
        return next(away, None)

    def _on_change(self) -> None:
        """A replica came, went, or is another one now: look who serves what, and who runs."""
        self._changed.set()
        by_model: dict[str, list[ReplicaFacts]] = {}
        for replica in self._replicas.values():
            for facts in replica.link.served:
                by_model.setdefault(facts.model, []).append(facts)
        self._served = tuple(map(least_of, by_model.values()))
        if not all(replica.link.is_running for replica in self._replicas.values()):
            self._leave_lost()

    def _leave_lost(self) -> None:
        """Have the requests of replicas that do not run them go on where they are run."""
        now_ns = self._clock.now_ns()
        full = {
            replica.name for replica in self._replicas.values() if replica.full_until_ns > now_ns
        }
        num_moved = 0
        for handle, placed in list(self._placed.items()):
            link = placed.replica.link
            living = None if link.is_running else link.get(placed.handle)
            target = None if living is None else self._find_open(living.submission, full)
            if living is None or target is None:
                continue
            if link.is_connected:
                living.mailbox.lost_ns = now_ns
            # What was retained there is lost with it; the prompt has all of its tokens.
            living.submission = replace(living.submission, prefix_handle="")
            placed.refused_by.clear()
            placed.replica.num_moved += 1
            self._move(handle, placed, target)
            num_moved += 1
        if num_moved:
            _log.warning("requests_moved", num_requests=num_moved)

    def _move(self, handle: int, placed: _Placed, target: Replica) -> None:
        living = placed.replica.link.release(placed.handle)
        placed.replica.handles.pop(placed.handle, None)
        assert living is not None, f"request {handle} has ended"
        placed.replica, placed.handle = target, target.link.adopt(living)
        self._note_placed(handle, placed.handle, target, living.mailbox)
        living.mailbox.num_moves += 1
        if living.submission.prefix_handle:
            self._remember(living.submission, target)

    def _note_placed(self, handle: int, number: int, replica: Replica, mailbox: Mailbox) -> None:
        replica.handles[number] = handle
        replica.num_requests += 1
        mailbox.replica = replica.name

    def _remember(self, submission: Submission, replica: Replica) -> None:
        """A retained prefix may be there; whoever retained it chose the replica, not we."""
        key = (submission.tenant, submission.prefix_handle)
        self._homes[key] = replica.name
        self._homes.move_to_end(key)
        if len(self._homes) > _NUM_HANDLES_KNOWN_MAX:
            self._homes.popitem(last=False)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
