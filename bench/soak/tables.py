"""A block table in the second set of books."""

from collections.abc import Iterable, Mapping
from typing import Self


class Table:
    """Blocks of one sequence by entry: groups of layers take turns, block by block.

    Entry ``e`` of ``G`` groups is logical block ``e // G`` in group ``e % G``. What has left a
    window is not here.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}
        self._entries: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def blocks(self) -> list[int]:
        """In the order of entries."""
        return [block_id for _, block_id in sorted(self._blocks.items())]

    def entries(self) -> list[int]:
        """Those that there are."""
        return sorted(self._blocks)

    def block_at(self, entry: int) -> int | None:
        """The block there, if there is one."""
        return self._blocks.get(entry)

    def entry_of(self, block_id: int) -> int | None:
        """Where a block stands, if it does."""
        return self._entries.get(block_id)

    def put(self, entry: int, block_id: int) -> None:
        """A block stands there now."""
        self._blocks[entry] = block_id
        self._entries[block_id] = entry

    def append(self, block_ids: Iterable[int]) -> None:
        """Blocks stand behind all others."""
        end = max(self._blocks, default=-1) + 1
        for entry, block_id in enumerate(block_ids, start=end):
            self.put(entry, block_id)

    def remove(self, block_id: int) -> int:
        """A block stands here no longer; returns where it stood."""
        entry = self._entries.pop(block_id)
        del self._blocks[entry]
        return entry

    def rename(self, new_place: Mapping[int, int]) -> bool:
        """Blocks have moved; whether any of them is here."""
        is_here = not new_place.keys().isdisjoint(self._entries)
        if is_here:
            for entry, block_id in list(self._blocks.items()):
                self._blocks[entry] = new_place.get(block_id, block_id)
            self._entries = {block_id: entry for entry, block_id in self._blocks.items()}
        return is_here

    def copy(self) -> Self:
        """The same blocks at the same entries."""
        table = type(self)()
        table._blocks, table._entries = self._blocks.copy(), self._entries.copy()
        return table
