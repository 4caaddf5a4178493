"""Blocks of the fake engine: numbers in tables, and who is charged for them.

A block that stands in two tables is shared; whoever writes there first gets a block of its own
(copy-on-write), and the last one writes in place.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from typing import Self

from pageframe.core.units import ceil_div


@dataclass(slots=True)
class FakePool:
    """Tables of block numbers by sequence id.

    There is no end of numbers: a pool that is overdrawn just has fewer than no blocks free, which
    its owner looks for.

    Attributes:
        block_size: Tokens per block.
        tables: Blocks of each sequence that has any, in order.
        owners: Tenant that each block is charged to.
        num_copied: Copies on write so far, by sequence id.
    """

    block_size: int
    tables: dict[int, list[int]] = field(default_factory=dict)
    owners: dict[int, str] = field(default_factory=dict)
    num_copied: Counter[int] = field(default_factory=Counter)
    _numbers: "count[int]" = field(default_factory=count)

    @property
    def references(self) -> Counter[int]:
        """How many tables each held block stands in."""
        return Counter(block for table in self.tables.values() for block in table)

    @property
    def num_held(self) -> int:
        """Blocks that stand in a table."""
        return len(self.references)

    def num_held_by(self, tenant: str) -> int:
        """Blocks that are charged to a tenant."""
        return sum(self.owners[block] == tenant for block in self.references)

    def num_blocks_of(self, sequence_id: int) -> int:
        """Length of a sequence's table."""
        return len(self.tables.get(sequence_id, ()))

    def copy(self) -> Self:
        """Another pool of the same content, to try something out."""
        tables = {sequence_id: list(table) for sequence_id, table in self.tables.items()}
        return type(self)(
            self.block_size, tables, dict(self.owners), self.num_copied.copy(), self._numbers
        )

    def write(self, sequence_id: int, start: int, end: int, tenant: str = "") -> None:
        """Make positions ``[start, end)`` of a sequence writable."""
        table = self.tables.setdefault(sequence_id, [])
        references = self.references
        for logical in range(start // self.block_size, ceil_div(end, self.block_size)):
            if logical < len(table) and references[table[logical]] == 1:
                continue
            block = next(self._numbers)
            self.owners[block] = tenant
            if logical < len(table):
                self.num_copied[sequence_id] += 1
                table[logical] = block
            else:
                assert logical == len(table), f"sequence {sequence_id} skips block {len(table)}"
                table.append(block)

    def share(self, source_id: int, target_id: int, num_blocks: int) -> None:
        """Let a sequence without blocks begin with the first blocks of another one."""
        assert not self.tables.get(target_id), f"sequence {target_id} has blocks already"
        self.tables[target_id] = self.tables[source_id][:num_blocks]

    def cut(self, sequence_id: int, num_blocks: int) -> None:
        """Leave a sequence only its first ``num_blocks``."""
        del self.tables.get(sequence_id, [])[num_blocks:]

    def drop(self, sequence_id: int) -> None:
        """Give up all blocks of a sequence."""
        self.tables.pop(sequence_id, None)
