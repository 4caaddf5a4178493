"""What the second set of books says of host slots."""

from collections import Counter

from bench.soak.entries import HostCopy, Name, ViolationError


class HostBooks:
    """Copies in the host tier, as records told of them.

    Attributes:
        copies: By host slot.
        slots: Host slot by name.
        promised: Names that the host tier has to keep, and for how many sequences.
    """

    def __init__(self) -> None:
        self.copies: dict[int, HostCopy] = {}
        self.slots: dict[Name, int] = {}
        self.promised: Counter[Name] = Counter()
        self._stored: list[int] = []

    def __len__(self) -> int:
        return len(self.copies)

    def begin_step(self) -> None:
        """What was stored so far is there to stay."""
        self._stored.clear()

    def store(self, slot: int, name: Name, content: list[int]) -> None:
        """A block is copied into a slot; what was there is gone.

        Raises:
            ViolationError: it is in another slot already, or what was there had to be kept.
        """
        if name in self.slots:
            raise ViolationError(f"{name} is in slot {self.slots[name]}, and copied to {slot}")
        self.forget(slot)
        self.copies[slot] = HostCopy(name, content.copy())
        self.slots[name] = slot
        self._stored.append(slot)

    def forget(self, slot: int) -> None:
        """A slot is free again.

        Raises:
            ViolationError: what was there had to be kept.
        """
        copy = self.copies.pop(slot, None)
        if copy is None:
            return
        if self.promised[copy.name]:
            raise ViolationError(f"slot {slot} is given away; {copy.name} in it is being kept")
        del self.slots[copy.name]

    def forget_name(self, name: Name) -> None:
        """Nobody will ask for this content any more."""
        if name in self.slots:
            self.forget(self.slots[name])

    def lose_stored(self) -> None:
        """What this step has stored did not arrive."""
        for slot in self._stored:
            self.forget(slot)

    def has(self, names: list[Name]) -> bool:
        """Whether all of them are there."""
        return all(name in self.slots for name in names)
