"""Prefixes that are kept by name: handles of ``KvMemoryService.Retain``, and sessions of chats.

    open ──▶ wants its keys ──note_pinned──▶ pins a block for each
                  ▲                               │
                  └────────note_unpinned──────────┘ demoted: held in the host tier instead
    close, by request or when ``due`` says that it has expired

A retention is a name, an owner, a list of block keys and two points in time. A block that holds the
content of a listed key is *pinned*: it has a reference without an entry in a block table. The pool
and the host tier are told by the caller; this file knows who wants what, and until when.

The simple thing is to look at every retention in every step. A step asks two questions, and each
has a book of its own: who wants the block that was just indexed (a dictionary from key), and whose
time has come (a heap of times, in which renewed and closed retentions leave stale entries that show
when they come up). So a step costs what is wanted and due, not what is open.
"""

import enum
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from pageframe.core.errors import (
    InvalidRequestError,
    NotFoundError,
    OutOfRangeError,
    ResourceExhaustedError,
)
from pageframe.executor.memory.block_keys import BlockKey

NEVER = 0
"""The point in time, in nanoseconds, that does not come."""

HANDLE_TTL_NS_MAX = 24 * 3600 * 10**9
NUM_HANDLES_PER_TENANT_MAX = 1024
NUM_SESSIONS_PER_TENANT_MAX = 65_536


@enum.unique
class RetentionKind(enum.StrEnum):
    """Who asked for it; each kind has names of its own."""

    HANDLE = "handle"
    """A caller of ``KvMemoryService.Retain``."""
    SESSION = "session"
    """A chat, whose next turn begins with all the turns before it."""


@dataclass(slots=True, eq=False)
class Retention:
    """One prefix kept by name. Changed by ``Retentions`` alone, ``held_keys`` by its caller.

    Attributes:
        name: Unique within kind and tenant.
        tenant: Whose.
        kind: Who asked for it.
        keys: Keys of the prefix's full blocks, head of the chain first; in groups of layers with
            a window only of those that whoever goes on behind it will read.
        expire_ns: When it ends, in nanoseconds since the epoch.
        pinned: Key to the device block that is pinned for it. May name keys that a renewal no
            longer lists, until their pins are given back.
        demote_ns: When what is pinned goes to the host tier; ``NEVER`` also once that was due.
        held_keys: Keys held in the host tier for it.
        num_tokens: Tokens in the prefix's full blocks.
    """

    name: str
    tenant: str
    kind: RetentionKind
    keys: list[BlockKey]
    expire_ns: int
    pinned: dict[BlockKey, int] = field(default_factory=dict)
    demote_ns: int = NEVER
    held_keys: set[BlockKey] = field(default_factory=set)
    num_tokens: int = 0
    _listed: frozenset[BlockKey] = field(default=frozenset(), init=False, repr=False)
    _renewal: int = field(default=0, init=False, repr=False)

    @property
    def is_session(self) -> bool:
        """Whether it is a chat's, whose pins give way while somebody runs."""
        return self.kind is RetentionKind.SESSION

    def unlisted_keys(self) -> list[BlockKey]:
        """Keys pinned or held for it that its list has no more: to be given back by the caller."""
        kept = dict.fromkeys(chain(self.pinned, sorted(self.held_keys)))
        return [key for key in kept if key not in self._listed]


class DueRetentions(NamedTuple):
    """What a look at the clock found; both in the order of their times.

    Attributes:
        expired: Have ended; the caller gives back what is pinned and held, and closes them.
        to_demote: What is pinned for them is to go to the host tier.
    """

    expired: list[Retention]
    to_demote: list[Retention]


class _Alarm(NamedTuple):
    """A point in time of a retention as it was at one renewal; ``number`` is unique."""

    time_ns: int
    number: int
    is_expiry: bool
    renewal: int
    retention: Retention


_Name = tuple[RetentionKind, str, str]


class Retentions:
    """All retentions of a pool: names, owners, wants, pins and times."""

    def __init__(
        self,
        *,
        handle_ttl_ns_max: int = HANDLE_TTL_NS_MAX,
        num_handles_per_tenant_max: int = NUM_HANDLES_PER_TENANT_MAX,
        num_sessions_per_tenant_max: int = NUM_SESSIONS_PER_TENANT_MAX,
    ) -> None:
        self._handle_ttl_ns_max = handle_ttl_ns_max
        self._num_per_tenant_max = {
            RetentionKind.HANDLE: num_handles_per_tenant_max,
            RetentionKind.SESSION: num_sessions_per_tenant_max,
        }
        self._open: dict[_Name, Retention] = {}
        self._num_open: Counter[tuple[RetentionKind, str]] = Counter()
        self._num_pinned: Counter[str] = Counter()
        # Sets in insertion order, so that the same calls give the same answers.
        self._wanting: dict[BlockKey, dict[Retention, None]] = {}
        self._pins_of_block: dict[int, dict[Retention, BlockKey]] = {}
        self._alarms: list[_Alarm] = []
        self._num_alarms = 0

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Retention]:
        """All open retentions, oldest first; a renewal keeps its place."""
        return iter(self._open.values())

    def handle_expire_ns(self, *, now_ns: int, ttl_ns: int) -> int:
        """When a handle ends that is opened at ``now_ns`` for ``ttl_ns``, in nanoseconds.

        Raises:
            InvalidRequestError: reason HANDLE_TTL_NOT_POSITIVE.
            OutOfRangeError: reason HANDLE_TTL_ABOVE_MAX.
        """
        if ttl_ns <= 0:
            raise InvalidRequestError(
                "HANDLE_TTL_NOT_POSITIVE",
                f"a handle is asked for {ttl_ns} ns; give a time to live above 0",
                ttl_ns=ttl_ns,
            )
        if ttl_ns > self._handle_ttl_ns_max:
            raise OutOfRangeError(
                "HANDLE_TTL_ABOVE_MAX",
                f"a handle is asked for {ttl_ns} ns, "
                f"this server keeps one for at most {self._handle_ttl_ns_max} ns",
                ttl_ns=ttl_ns,
                ttl_ns_max=self._handle_ttl_ns_max,
            )
        return now_ns + ttl_ns

    def open(
        self,
        *,
        name: str,
        tenant: str,
        kind: RetentionKind,
        keys: Sequence[BlockKey],
        expire_ns: int,
        demote_ns: int = NEVER,
        num_tokens: int = 0,
    ) -> Retention:
        """Open a retention, or renew the one of this kind, tenant and name: O(len(keys)).

        A renewal replaces keys and times and returns the same object. What was pinned or held for
        keys that are listed no more stays so until the caller gives it back: see
        ``Retention.unlisted_keys``.

        Raises:
            ResourceExhaustedError: reason RETENTIONS_FULL; the tenant has as many of this kind as
                it may. A renewal is always possible.
        """
        assert expire_ns > NEVER, f"{kind} {name!r} expires at {expire_ns} ns"
        retention = self._open.get((kind, tenant, name))
        if retention is None:
            self._check_room(kind, tenant)
            retention = Retention(name, tenant, kind, [], expire_ns)
            self._open[kind, tenant, name] = retention
            self._num_open[kind, tenant] += 1
        self._list_keys(retention, keys)
        retention.expire_ns, retention.demote_ns = expire_ns, demote_ns
        retention.num_tokens = num_tokens
        retention._renewal += 1
        self._set_alarms(retention)
        return retention

    def get(self, kind: RetentionKind, tenant: str, name: str) -> Retention:
        """The open retention of this name.

        Raises:
            NotFoundError: reason HANDLE_UNKNOWN; the tenant has none. That of another tenant looks
                exactly like one that never was.
        """
        retention = self._open.get((kind, tenant, name))
        if retention is None:
            raise NotFoundError("HANDLE_UNKNOWN", f"the tenant has no {kind} {name[:200]!r} open")
        return retention

    def close(self, retention: Retention) -> None:
        """Forget it and its pins, whose references the caller gives back, now or before.

        ``pinned`` and ``held_keys`` of the object keep what had not been given back.
        """
        self._assert_open(retention)
        for key in retention._listed:
            self._unwant(retention, key)
        for block_id in retention.pinned.values():
            self._forget_pin(retention, block_id)
        del self._open[retention.kind, retention.tenant, retention.name]
        owner = (retention.kind, retention.tenant)
        self._num_open[owner] -= 1
        if not self._num_open[owner]:
            del self._num_open[owner]

    def wanting(self, key: BlockKey) -> list[Retention]:
        """Open retentions that list ``key`` and have not pinned it, in a new list."""
        return list(self._wanting.get(key, ()))

    def note_pinned(self, retention: Retention, key: BlockKey, block_id: int) -> None:
        """``block_id`` holds the content of ``key`` and has got a reference for ``retention``."""
        assert retention in self._wanting.get(key, ()), (
            f"{retention.kind} {retention.name!r} does not want key {key.hex()}"
        )
        pins = self._pins_of_block.setdefault(block_id, {})
        assert retention not in pins, (
            f"{retention.kind} {retention.name!r} pins block {block_id} under two keys"
        )
        self._unwant(retention, key)
        retention.pinned[key] = block_id
        pins[retention] = key
        self._num_pinned[retention.tenant] += 1

    def note_unpinned(self, retention: Retention, key: BlockKey) -> None:
        """That reference is given back; ``retention`` wants ``key`` again if it still lists it."""
        self._assert_open(retention)
        assert key in retention.pinned, (
            f"{retention.kind} {retention.name!r} has not pinned key {key.hex()}"
        )
        self._forget_pin(retention, retention.pinned.pop(key))
        if key in retention._listed:
            self._want(retention, key)

    def move_block(self, source: int, target: int) -> None:
        """The content of block ``source``, pins included, is now in block ``target``."""
        assert target not in self._pins_of_block, f"block {target} is pinned, {source} moves there"
        pins = self._pins_of_block.pop(source, None)
        if pins is None:
            return
        for retention, key in pins.items():
            retention.pinned[key] = target
        self._pins_of_block[target] = pins

    def due(self, now_ns: int) -> DueRetentions:
        """Whose time has come by ``now_ns``: O(due). Each is told once for each renewal.

        One that has expired stays open until the caller closes it, and is not also to be demoted.
        """
        found = DueRetentions([], [])
        while (alarm := self._first_alarm()) is not None and alarm.time_ns <= now_ns:
            heapq.heappop(self._alarms)
            if alarm.is_expiry:
                found.expired.append(alarm.retention)
            else:
                alarm.retention.demote_ns = NEVER
                found.to_demote.append(alarm.retention)
        expired = set(found.expired)
        found.to_demote[:] = [item for item in found.to_demote if item not in expired]
        return found

    @property
    def next_due_ns(self) -> int:
        """When ``due`` will next have something to tell; ``NEVER`` when nothing will be due."""
        alarm = self._first_alarm()
        return NEVER if alarm is None else alarm.time_ns

    def num_pinned_by_tenant(self, tenant: str) -> int:
        """Pins of the tenant's retentions; a block that two of them pin counts twice."""
        return self._num_pinned[tenant]

    def pins_of(self, block_id: int) -> list[tuple[Retention, BlockKey]]:
        """Who has pinned this block, and under which key, in a new list."""
        return list(self._pins_of_block.get(block_id, {}).items())

    def pinned_block_ids(self) -> Iterator[int]:
        """The block of every pin, one with several pins as often: the references they stand for."""
        for block_id, pins in self._pins_of_block.items():
            for _ in pins:
                yield block_id

    def check(self) -> list[str]:
        """Recompute all books from the retentions: one sentence per fault, none when sound."""
        faults = []
        pins: dict[int, dict[Retention, BlockKey]] = {}
        wants: dict[BlockKey, set[Retention]] = {}
        for retention in self:
            for key, block_id in retention.pinned.items():
                pins.setdefault(block_id, {})[retention] = key
            for key in retention._listed - retention.pinned.keys():
                wants.setdefault(key, set()).add(retention)
        if pins != self._pins_of_block:
            faults.append(f"{len(pins)} blocks are pinned, {len(self._pins_of_block)} are booked")
        if wants != {key: set(wanting) for key, wanting in self._wanting.items()}:
            faults.append(f"{len(wants)} keys are wanted, {len(self._wanting)} are booked")
        num_pinned: Counter[str] = Counter()
        for retention in self:
            num_pinned[retention.tenant] += len(retention.pinned)
        if num_pinned != self._num_pinned:
            faults.append(f"pins per tenant are {+num_pinned}, counted were {self._num_pinned}")
        num_open = Counter((retention.kind, retention.tenant) for retention in self)
        if num_open != self._num_open:
            faults.append(f"{num_open.total()} are open, {self._num_open.total()} were counted")
        return faults

    def _check_room(self, kind: RetentionKind, tenant: str) -> None:
        num_open, num_max = self._num_open[kind, tenant], self._num_per_tenant_max[kind]
        if num_open >= num_max:
            raise ResourceExhaustedError(
                "RETENTIONS_FULL",
                f"the tenant has {num_open} {kind}s open, {num_max} are allowed; "
                "release one, or wait until one expires",
                num_open=num_open,
                num_max=num_max,
            )

    def _assert_open(self, retention: Retention) -> None:
        name = (retention.kind, retention.tenant, retention.name)
        assert self._open.get(name) is retention, f"{retention.kind} {retention.name!r} is not open"

    def _list_keys(self, retention: Retention, keys: Sequence[BlockKey]) -> None:
        before, listed = retention._listed, frozenset(keys)
        for key in before - listed:
            self._unwant(retention, key)
        for key in listed - before:
            if key not in retention.pinned:
                self._want(retention, key)
        retention.keys, retention._listed = list(keys), listed

    def _want(self, retention: Retention, key: BlockKey) -> None:
        self._wanting.setdefault(key, {})[retention] = None

    def _unwant(self, retention: Retention, key: BlockKey) -> None:
        """Stop wanting a key; it may be pinned, and then is not wanted anyway."""
        wanting = self._wanting.get(key)
        if wanting is None:
            return
        wanting.pop(retention, None)
        if not wanting:
            del self._wanting[key]

    def _forget_pin(self, retention: Retention, block_id: int) -> None:
        pins = self._pins_of_block[block_id]
        del pins[retention]
        if not pins:
            del self._pins_of_block[block_id]
        self._num_pinned[retention.tenant] -= 1
        if not self._num_pinned[retention.tenant]:
            del self._num_pinned[retention.tenant]

    def _set_alarms(self, retention: Retention) -> None:
        # A retention has two alarms at most; what is beyond that is stale. A sorted list is a heap,
        # and it is made anew only after as many alarms were set, so each costs O(log open).
        if len(self._alarms) > 4 * len(self._open) + 16:
            self._alarms = sorted(alarm for alarm in self._alarms if self._is_valid(alarm))
        for time_ns, is_expiry in ((retention.expire_ns, True), (retention.demote_ns, False)):
            if time_ns != NEVER:
                self._num_alarms += 1
                alarm = _Alarm(time_ns, self._num_alarms, is_expiry, retention._renewal, retention)
                heapq.heappush(self._alarms, alarm)

    def _is_valid(self, alarm: _Alarm) -> bool:
        retention = alarm.retention
        name = (retention.kind, retention.tenant, retention.name)
        return self._open.get(name) is retention and alarm.renewal == retention._renewal

    def _first_alarm(self) -> _Alarm | None:
        """The next valid alarm; takes stale ones off on the way."""
        while self._alarms and not self._is_valid(self._alarms[0]):
            heapq.heappop(self._alarms)
        return self._alarms[0] if self._alarms else None
