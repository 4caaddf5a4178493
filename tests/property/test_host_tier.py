"""The host tier against a list in order of use, searched from its front."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pageframe.core.errors import InternalError
from pageframe.executor.memory.host_tier import NO_SLOT, HostTier

KEYS = [number.to_bytes(32, "little") for number in range(9)]
any_key = st.sampled_from(KEYS)


@dataclass
class Entry:
    key: bytes
    slot: int
    is_in_transfer: bool = True
    num_holds: int = 0

    @property
    def is_droppable(self) -> bool:
        return not self.is_in_transfer and not self.num_holds


class HostTierMachine(RuleBasedStateMachine):
    """Store, read, hold and drop in any order; the model searches where the tier has books."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []  # Least recently used first.
        self.contents: dict[int, bytes] = {}  # Slot to the key copied there last.
        self.num_dropped = 0

    @initialize(num_slots=st.integers(0, 5))
    def start(self, num_slots: int) -> None:
        self.tier = HostTier(num_slots)

    def entry_of(self, key: bytes) -> Entry | None:
        return next((entry for entry in self.entries if entry.key == key), None)

    def use(self, entry: Entry) -> None:
        self.entries.remove(entry)
        self.entries.append(entry)

    @rule(key=any_key)
    def store(self, key: bytes) -> None:
        if self.entry_of(key):
            with pytest.raises(AssertionError, match="stored twice"):
                self.tier.store(key)
            return
        victim = None
        if len(self.entries) == self.tier.num_slots:
            victim = next((entry for entry in self.entries if entry.is_droppable), None)
            if victim is None:
                assert self.tier.store(key) == NO_SLOT
                return
            self.entries.remove(victim)
            self.num_dropped += 1
        slot = self.tier.store(key)
        assert 0 <= slot < self.tier.num_slots
        assert victim is None or slot == victim.slot
        assert slot not in [entry.slot for entry in self.entries]
        self.contents[slot] = key
        self.entries.append(Entry(key, slot))

    @rule(key=any_key)
    def read(self, key: bytes) -> None:
        entry = self.entry_of(key)
        if entry is None:
            with pytest.raises(AssertionError, match="not inside"):
                self.tier.read(key)
            return
        assert self.contents[self.tier.read(key)] == key
        entry.is_in_transfer = True
        self.use(entry)

    @rule(key=any_key)
    def touch(self, key: bytes) -> None:
        if entry := self.entry_of(key):
            self.tier.touch(key)
            self.use(entry)

    @rule()
    def finish_transfers(self) -> None:
        self.tier.finish_transfers()
        for entry in self.entries:
            entry.is_in_transfer = False

    @rule(key=any_key)
    def finish_one_transfer(self, key: bytes) -> None:
        entry = self.entry_of(key)
        if entry is None or not entry.is_in_transfer:
            with pytest.raises(AssertionError, match="not in transfer"):
                self.tier.finish_transfer(key)
            return
        self.tier.finish_transfer(key)
        entry.is_in_transfer = False

    @rule(key=any_key)
    def hold(self, key: bytes) -> None:
        entry = self.entry_of(key)
        if entry is None:
            with pytest.raises(InternalError, match="HOST_KEY_UNKNOWN"):
                self.tier.hold(key)
            return
        self.tier.hold(key)
        entry.num_holds += 1

    @rule(key=any_key)
    def drop_hold(self, key: bytes) -> None:
        entry = self.entry_of(key)
        if entry is None or not entry.num_holds:
            with pytest.raises(InternalError, match="HOST_KEY_NOT_HELD"):
                self.tier.drop_hold(key)
            return
        self.tier.drop_hold(key)
        entry.num_holds -= 1

    @rule(key=any_key)
    def remove(self, key: bytes) -> None:
        entry = self.entry_of(key)
        if entry is None or not entry.is_droppable:
            with pytest.raises(AssertionError):
                self.tier.remove(key)
            return
        self.tier.remove(key)
        self.entries.remove(entry)

    @invariant()
    def agrees_with_the_model(self) -> None:
        tier = self.tier
        assert tier.check() == []
        assert tier.keys() == [entry.key for entry in self.entries]
        assert tier.num_used == len(self.entries)
        assert tier.num_held == sum(entry.num_holds > 0 for entry in self.entries)
        assert tier.num_dropped == self.num_dropped
        slots = {entry.key: entry.slot for entry in self.entries}
        for key in KEYS:
            assert (key in tier) == (key in slots)
            assert tier.slot_of(key) == slots.get(key, NO_SLOT)


TestHostTier = HostTierMachine.TestCase
TestHostTier.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None, print_blob=True
)
