"""Which slot of host memory holds the content of which block key.

The second home of blocks: what leaves the device is copied to a *host slot* under its key, and
found again by that key. This file keeps the books only; the bytes are the runner's.

                 store: in transfer ──▶ droppable ──drop (full, least recently used)──▶ slot is free
                 read:  in transfer ──▶     │ ▲
                                       hold ▼ │ last hold dropped
                                          held

The simple thing is an ordered dictionary whose first entry is dropped. Entries that are held for a
swapped-out sequence grow old at its front, and each drop would have to walk past all of them. Here
the order of use and the candidates are two books: every use of a key gets a running number, and a
heap has the numbers of the keys that may be dropped. A number in the heap may be stale (its key was
used again, held again or is gone); that shows when it comes up. So a store, a read or a hold costs
O(log num_slots), averaged over a run, however many are held.

Blocks of preempted sequences in host memory are an idea of PagedAttention (Kwon et al. 2023,
section 4.5). There they belong to a sequence; here they have a key, so that anybody may find them.
"""

import heapq
from dataclasses import dataclass
from typing import Protocol

from pageframe.core.errors import InternalError
from pageframe.executor.memory.block_keys import BlockKey

NO_SLOT = -1


class BlockStore(Protocol):
    """A place for the bytes of blocks, by key: what a disk or a remote tier offers.

    The host tier is not one: its bytes stay in the runner's memory and move by slot number. A store
    may forget anything at any time, because every block can be computed again; it must never answer
    with the bytes of another key.
    """

    def get(self, key: BlockKey) -> bytes | None:
        """The bytes put under ``key``, payload then scales; None when they are not here."""
        ...

    def put(self, key: BlockKey, data: bytes) -> bool:
        """Keep ``data`` under ``key``; whether it was kept. A key that is here already counts."""
        ...

    def __contains__(self, key: object) -> bool:
        """Whether ``get`` would find it now. It may be gone when asked for later."""
        ...


@dataclass(slots=True)
class _Entry:
    """One occupied slot. ``use`` is the running number of the last store, read or touch."""

    slot: int
    use: int
    num_holds: int = 0


class HostTier:
    """Host slots by key. Drops the least recently used; held ones and ones in transfer never.

    A store, a read or a touch is a use, a hold is not. A transfer begins with ``store`` or ``read``
    and ends with ``finish_transfers``, or ``finish_transfer`` for a single key.

    Attributes:
        num_slots: Host slots in all; with 0 there is no tier, and every question is answered so.
    """

    def __init__(self, num_slots: int) -> None:
        assert num_slots >= 0, f"a host tier of {num_slots} slots"
        self.num_slots = num_slots
        self._entries: dict[BlockKey, _Entry] = {}
        # Number of the last use to key, in the order of use.
        self._by_use: dict[int, BlockKey] = {}
        self._in_transfer: dict[BlockKey, None] = {}
        # Use numbers of all droppable keys, and stale ones.
        self._candidates: list[int] = []
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._num_uses = 0
        self._num_held = 0
        self._num_dropped = 0

    @property
    def num_used(self) -> int:
        """Slots with content."""
        return len(self._entries)

    @property
    def num_held(self) -> int:
        """Slots whose content is held, however often."""
        return self._num_held

    @property
    def num_dropped(self) -> int:
        """Entries that were dropped to make room, since the start."""
        return self._num_dropped

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def slot_of(self, key: BlockKey) -> int:
        """The slot with the content of ``key``, or ``NO_SLOT``. Does not count as a use."""
        entry = self._entries.get(key)
        return NO_SLOT if entry is None else entry.slot

    def store(self, key: BlockKey) -> int:
        """Give ``key``, which must not be inside, a slot to copy to; it is in transfer, and newest.

        When no slot is free, the least recently used droppable entry loses its own.

        Returns:
            The slot; ``NO_SLOT`` when every slot is held or in transfer, and nothing was changed.
        """
        assert key not in self._entries, f"key {key.hex()} is stored twice"
        if not self._free_slots and not self._drop_oldest():
            return NO_SLOT
        slot = self._free_slots.pop()
        self._entries[key] = _Entry(slot, self._next_use(key))
        self._in_transfer[key] = None
        return slot

    def read(self, key: BlockKey) -> int:
        """The slot of ``key``, which must be inside, to copy from; it is in transfer, and newest.

        May follow the ``store`` of the same step: a step copies out before it copies in.
        """
        entry = self._entries.get(key)
        assert entry is not None, f"key {key.hex()} is read and not inside"
        self._use(key, entry)
        self._in_transfer[key] = None
        return entry.slot

    def touch(self, key: BlockKey) -> None:
        """Make ``key``, which must be inside, the newest without a transfer.

        For a block that would be stored now, had its content not been here already.
        """
        entry = self._entries.get(key)
        assert entry is not None, f"key {key.hex()} is touched and not inside"
        self._use(key, entry)
        self._offer(key, entry)

    def finish_transfers(self) -> None:
        """All copies asked for so far have been made: their entries may be dropped again."""
        finished, self._in_transfer = self._in_transfer, {}
        for key in finished:
            self._offer(key, self._entries[key])

    def finish_transfer(self, key: BlockKey) -> None:
        """The one copy asked for ``key``, which must be in transfer, has been made; others wait.

        For content that is brought in from outside, between steps.
        """
        assert key in self._in_transfer, f"key {key.hex()} is not in transfer"
        del self._in_transfer[key]
        self._offer(key, self._entries[key])

    def hold(self, key: BlockKey) -> None:
        """Keep ``key`` from being dropped, until ``drop_hold`` was called as often as this.

        Raises:
            InternalError: reason HOST_KEY_UNKNOWN; the key is not inside.
        """
        entry = self._entries.get(key)
        if entry is None:
            raise InternalError(
                "HOST_KEY_UNKNOWN",
                f"key {key.hex()} is none of the {self.num_used} in the host tier",
                key=key.hex(),
                num_used=self.num_used,
            )
        self._num_held += entry.num_holds == 0
        entry.num_holds += 1

    def drop_hold(self, key: BlockKey) -> None:
        """Take one hold back. The last one lets the entry be dropped; its place in the order stays.

        Raises:
            InternalError: reason HOST_KEY_NOT_HELD; nobody holds the key, or it is not inside.
        """
        entry = self._entries.get(key)
        if entry is None or not entry.num_holds:
            raise InternalError(
                "HOST_KEY_NOT_HELD",
                f"key {key.hex()} is none of the {self._num_held} held in the host tier",
                key=key.hex(),
                num_held=self._num_held,
            )
        entry.num_holds -= 1
        if not entry.num_holds:
            self._num_held -= 1
            self._offer(key, entry)

    def remove(self, key: BlockKey) -> None:
        """Forget ``key``, which must be inside, and neither held nor in transfer."""
        entry = self._entries.get(key)
        assert entry is not None, f"key {key.hex()} is removed and not inside"
        assert not entry.num_holds, f"key {key.hex()} is removed under {entry.num_holds} holds"
        assert key not in self._in_transfer, f"key {key.hex()} is removed in transfer"
        self._forget(key, entry)

    def discard(self, key: BlockKey) -> None:
        """Forget a key, unless it is not here, held, or in transfer: then it just grows old."""
        entry = self._entries.get(key)
        if entry is not None and self._is_droppable(key, entry):
            self._forget(key, entry)

    def keys(self) -> list[BlockKey]:
        """All keys in a new list, least recently used first."""
        return list(self._by_use.values())

    def check(self) -> list[str]:
        """Recompute slots, order and holds from nothing: one sentence per fault, none when sound.

        Walks the tier: O(num_slots).
        """
        faults = []
        slots = sorted([entry.slot for entry in self._entries.values()] + self._free_slots)
        if slots != list(range(self.num_slots)):
            faults.append(f"slots used and free are {slots}, not all of [0, {self.num_slots}) once")
        used = {entry.use: key for key, entry in self._entries.items()}
        if used != self._by_use or len(used) != len(self._entries):
            faults.append(f"{len(self._by_use)} keys in order of use, {len(self._entries)} inside")
        if list(self._by_use) != sorted(self._by_use):
            faults.append("the order of use runs back")
        num_held = sum(entry.num_holds > 0 for entry in self._entries.values())
        if num_held != self._num_held:
            faults.append(f"{num_held} keys are held, {self._num_held} were counted")
        if strangers := self._in_transfer.keys() - self._entries.keys():
            faults.append(f"{len(strangers)} keys are in transfer and not inside")
        candidates = set(self._candidates)
        for key, entry in self._entries.items():
            if entry.num_holds < 0:
                faults.append(f"key {key.hex()} has {entry.num_holds} holds")
            if self._is_droppable(key, entry) and entry.use not in candidates:
                faults.append(f"key {key.hex()} could be dropped and is not offered")
        return faults

    def _use(self, key: BlockKey, entry: _Entry) -> None:
        del self._by_use[entry.use]
        entry.use = self._next_use(key)

    def _next_use(self, key: BlockKey) -> int:
        self._num_uses += 1
        self._by_use[self._num_uses] = key
        return self._num_uses

    def _is_droppable(self, key: BlockKey, entry: _Entry) -> bool:
        return not entry.num_holds and key not in self._in_transfer

    def _offer(self, key: BlockKey, entry: _Entry) -> None:
        """Put an entry among the candidates if it may be dropped now."""
        if not self._is_droppable(key, entry):
            return
        # Stale numbers come up only when something is dropped; a tier that is never full has to get
        # rid of them as well. A sorted list is a heap, so this costs O(1) per number offered.
        if len(self._candidates) > 2 * self.num_slots:
            self._candidates = [
                use
                for use, used in self._by_use.items()
                if self._is_droppable(used, self._entries[used])
            ]
        heapq.heappush(self._candidates, entry.use)

    def _drop_oldest(self) -> bool:
        while self._candidates:
            key = self._by_use.get(heapq.heappop(self._candidates))
            if key is None:
                continue
            entry = self._entries[key]
            if self._is_droppable(key, entry):
                self._forget(key, entry)
                self._num_dropped += 1
                return True
        return False

    def _forget(self, key: BlockKey, entry: _Entry) -> None:
        del self._entries[key]
        del self._by_use[entry.use]
        self._free_slots.append(entry.slot)
