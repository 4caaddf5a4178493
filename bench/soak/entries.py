"""What the second set of books has an entry for: blocks and host slots; and what is wrong there."""

from dataclasses import dataclass, field

from pageframe.executor.memory.block_columns import BlockState

Name = int | tuple[int, int, int, int]
"""What a block is found by: its last fingerprint; or epoch, sequence, generation and entry in the
block table, of a block that is not full and belongs to a sequence that was swapped out."""

UNSETTLED = "?"
"""Tenant of a block that a pin took up, until it is known who pinned it."""


class ViolationError(Exception):
    """The memory did what the law forbids, or is not what its records say."""


@dataclass(slots=True)
class Block:
    """What the books say of one block; ``state`` is None outside the pool."""

    state: BlockState | None = None
    holders: dict[int, int] = field(default_factory=dict)
    num_pins: int = 0
    tenant: str = ""
    name: Name | None = None
    content: list[int] = field(default_factory=list, repr=False)

    @property
    def num_references(self) -> int:
        """Table entries, transfers and pins."""
        return sum(self.holders.values()) + self.num_pins


@dataclass(slots=True)
class HostCopy:
    """What the books say of one host slot."""

    name: Name
    content: list[int]
