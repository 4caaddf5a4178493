"""A buddy allocator over slots: how the paper assumes that Orca places what it reserves.

Every region has a power of two as its size and begins at a multiple of it. A larger region is
halved until it is just large enough; two free halves of the same region become one again
(Knowlton, CACM 1965). A memory whose size is no power of two is a row of ever smaller ones.
"""


def round_up_to_power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``, which must be positive."""
    assert number > 0, f"{number} is not positive"
    return 1 << (number - 1).bit_length()


class BuddyAllocator:
    """Regions of contiguous slots.

    Attributes:
        num_slots: Slots in all.
        num_held: Slots that are given out, rounding included.
    """

    def __init__(self, num_slots: int) -> None:
        assert num_slots > 0, f"a memory of {num_slots} slots"
        self.num_slots = num_slots
        self.num_held = 0
        self._free: dict[int, set[int]] = {}
        self._sizes: dict[int, int] = {}
        address = 0
        for order in reversed(range(num_slots.bit_length())):
            self._free[order] = set()
            if num_slots & (1 << order):
                self._free[order].add(address)
                address += 1 << order

    def allocate(self, num_slots: int) -> int | None:
        """Address of a free region for at least ``num_slots``, or None when there is none."""
        wanted = (round_up_to_power_of_two(num_slots)).bit_length() - 1
        order = next(
            (order for order in sorted(self._free) if order >= wanted and self._free[order]), None
        )
        if order is None:
            return None
        # The lowest address first keeps the far end whole.
        address = min(self._free[order])
        self._free[order].discard(address)
        while order > wanted:
            order -= 1
            self._free[order].add(address + (1 << order))
        self._sizes[address] = wanted
        self.num_held += 1 << wanted
        return address

    def free(self, address: int) -> None:
        """Take a region back, and join it with its free buddies."""
        order = self._sizes.pop(address)
        self.num_held -= 1 << order
        # A buddy is never joined across two of the row's memories: each is smaller than the one
        # before it, so the slots beside a whole one are never a whole one of the same size.
        while (buddy := address ^ (1 << order)) in self._free.get(order, ()):
            self._free[order].discard(buddy)
            address = min(address, buddy)
            order += 1
        self._free[order].add(address)
