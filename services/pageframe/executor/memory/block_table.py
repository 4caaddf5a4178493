"""Which physical block holds which part of each running sequence.

One persistent int32 matrix, a row per running sequence: the batch of a step takes its rows with one
indexing operation, and a device can keep a mirror of it at a fixed address.

    row r   [ 12 | 3 | 40 | ? | ? | ? ]      num_blocks[r] = 3; entries behind it are undefined
              └ positions [0, B)   └ positions [2B, 3B)

Layers whose windows differ are in *groups*, and a block holds the layers of one group only. The
simple thing is a table for each group. Here they are one, in which the groups take turns:

    row r   [ 12 | 7 | 3 | 9 | 40 | 8 ]      two groups: entry = logical block * 2 + group
              group 0    └ logical block 1 of group 0, then of group 1

So whatever allocates, shares, copies or gives up entries need not know of groups; ``entries[:,
g::num_groups]`` is the table of group ``g`` alone.

Blocks that a sliding window has left behind are given up from the front: ``first_blocks[r]`` counts
them for each group, and entries before that are undefined too.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pageframe.core.units import ceil_div
from pageframe.executor.batch import Int32Array
from pageframe.executor.block_moves import Int64Array

FirstBlock = int | Sequence[int] | Int32Array


class BlockTables:
    """Block tables of all rows.

    Attributes:
        block_size: Tokens per block.
        num_groups: Groups of layers, G.
        entries: int32 [num_rows, W * G], W logical blocks hold the longest possible sequence.
        num_blocks: int32 [num_rows], where the valid entries of each row end; a multiple of G.
        first_blocks: int32 [num_rows, G], the logical block with which each group begins.
    """

    def __init__(
        self, num_rows: int, max_model_len: int, block_size: int, num_groups: int = 1
    ) -> None:
        self.block_size = block_size
        self.num_groups = num_groups
        width = ceil_div(max_model_len, block_size) * num_groups
        self.entries: Int32Array = np.zeros((num_rows, width), dtype=np.int32)
        self.num_blocks: Int32Array = np.zeros(num_rows, dtype=np.int32)
        self.first_blocks: Int32Array = np.zeros((num_rows, num_groups), dtype=np.int32)
        self._groups: Int32Array = np.arange(num_groups, dtype=np.int32)

    @property
    def first_block(self) -> Int32Array:
        """The logical block with which each row begins in any group: int32 [num_rows].

        With one group a view; else in a new array, for checks and for people.
        """
        if self.num_groups == 1:
            return self.first_blocks[:, 0]
        first: Int32Array = self.first_blocks.min(axis=1)
        return first

    def blocks_of(self, row: int) -> Int32Array:
        """The row's blocks, int32 [n], logical block by logical block, in each group by group.

        A view where nothing is missing in between; valid until the next change.
        """
        return self._between(row, 0, int(self.num_blocks[row]))

    def num_held(self, row: int) -> int:
        """How many blocks ``blocks_of`` has."""
        return int(self.num_blocks[row] - self.first_blocks[row].sum())

    def columns_of(self, row: int) -> Int32Array:
        """At which entries of the row ``blocks_of`` stand: int32 [n]."""
        columns: Int32Array = np.arange(self.num_blocks[row], dtype=np.int32)
        return columns[self._is_in_window(row, columns)]

    def is_valid(self) -> NDArray[np.bool_]:
        """Which entries of all rows are valid: bool [num_rows, W * G]. For checks and resizes."""
        column = np.arange(self.entries.shape[1])
        first = self.first_blocks[:, column % self.num_groups]
        behind_first: NDArray[np.bool_] = column // self.num_groups >= first
        return behind_first & (column < self.num_blocks[:, np.newaxis])

    def num_missing(self, row: int, num_tokens: int) -> int:
        """Blocks that the row lacks to hold ``num_tokens`` tokens."""
        num_blocks = ceil_div(num_tokens, self.block_size) * self.num_groups
        return max(0, num_blocks - int(self.num_blocks[row]))

    def rows_at_boundary(
        self, rows: NDArray[np.integer], num_computed: Int32Array
    ) -> NDArray[np.integer]:
        """Those of ``rows`` whose next token lies behind their last block.

        Args:
            rows: [n].
            num_computed: int32 [num_rows], computed tokens of every row.
        """
        num_blocks = self.num_blocks[rows]
        if self.num_groups > 1:
            num_blocks //= self.num_groups
        is_at_boundary: NDArray[np.bool_] = num_computed[rows] >= num_blocks * self.block_size
        return rows[is_at_boundary]

    def columns_at(self, logical_blocks: NDArray[np.integer]) -> Int64Array:
        """Entries of a row that hold these logical blocks [n]: int64 [n, G]."""
        first: Int64Array = logical_blocks.astype(np.int64) * self.num_groups
        columns: Int64Array = first[:, np.newaxis] + self._groups
        return columns

    def append(self, row: int, block_ids: NDArray[np.integer]) -> None:
        """Add blocks to the end of one row."""
        start = int(self.num_blocks[row])
        end = start + len(block_ids)
        assert end <= self.entries.shape[1], f"{end} blocks in a row of {self.entries.shape[1]}"
        self.entries[row, start:end] = block_ids
        self.num_blocks[row] = end

    def append_each(self, rows: NDArray[np.integer], block_ids: NDArray[np.integer]) -> None:
        """Add a logical block to each of ``rows``.

        Args:
            rows: int32 [n], without repetition.
            block_ids: [n * G], row by row, in each group by group.
        """
        ends = self.num_blocks[rows]
        if self.num_groups == 1:
            self.entries[rows, ends] = block_ids
        else:
            columns = ends[:, np.newaxis] + self._groups
            self.entries[rows[:, np.newaxis], columns] = block_ids.reshape(columns.shape)
        self.num_blocks[rows] += self.num_groups

    def fill(self, row: int, block_ids: Int32Array, first_block: FirstBlock = 0) -> None:
        """Begin an empty row.

        Args:
            row: Which.
            block_ids: int32 [n], in the order of ``blocks_of``.
            first_block: The logical block with which all groups begin, or each of the G.
        """
        assert not self.num_blocks[row], f"row {row} holds {self.num_blocks[row]} blocks"
        first_blocks = self.first_blocks[row]
        first_blocks[:] = first_block
        num_entries = len(block_ids) + int(first_blocks.sum())
        assert num_entries % self.num_groups == 0, f"{num_entries} for {self.num_groups} groups"
        self.num_blocks[row] = num_entries
        if not first_blocks.any():
            self.entries[row, :num_entries] = block_ids
        else:
            self.entries[row, self.columns_of(row)] = block_ids

    def cut_tail(self, row: int, num_blocks: int) -> Int32Array:
        """Keep the first ``num_blocks`` entries; returns the blocks behind, head first.

        ``num_blocks`` is a multiple of G, and no group begins behind it.
        """
        block_ids = self._between(row, num_blocks, int(self.num_blocks[row])).copy()
        self.num_blocks[row] = max(num_blocks, int(self.first_block[row]) * self.num_groups)
        return block_ids

    def cut_head(self, row: int, first_blocks: Int32Array) -> Int32Array:
        """Let groups begin with later logical blocks, int32 [G]; returns what was before.

        Costs as much as is given up, however long the row is.
        """
        bounds = zip(self.first_blocks[row].tolist(), first_blocks.tolist(), strict=True)
        columns = np.concatenate(
            [
                np.arange(old, new, dtype=np.int32) * self.num_groups + group
                for group, (old, new) in enumerate(bounds)
            ]
        )
        columns.sort()
        self.first_blocks[row] = first_blocks
        given_up: Int32Array = self.entries[row, columns]
        return given_up

    def clear(self, row: int) -> Int32Array:
        """Empty one row and return what it held, in a new array."""
        block_ids = self.blocks_of(row).copy()
        self.num_blocks[row] = 0
        self.first_blocks[row] = 0
        return block_ids

    def _between(self, row: int, start: int, end: int) -> Int32Array:
        """The blocks of valid entries in ``[start, end)``; a view where none is missing."""
        if self.num_groups == 1:
            return self.entries[row, max(start, int(self.first_blocks[row, 0])) : end]
        if not self.first_blocks[row].any():
            return self.entries[row, start:end]
        columns: Int32Array = np.arange(start, end, dtype=np.int32)
        block_ids: Int32Array = self.entries[row, columns[self._is_in_window(row, columns)]]
        return block_ids

    def _is_in_window(self, row: int, columns: Int32Array) -> NDArray[np.bool_]:
        first = self.first_blocks[row, columns % self.num_groups]
        is_in_window: NDArray[np.bool_] = columns // self.num_groups >= first
        return is_in_window

    def rename(self, sources: Int64Array, targets: Int64Array, num_blocks_max: int) -> None:
        """Blocks have moved: name each source by its target. Walks all rows."""
        name: Int32Array = np.arange(num_blocks_max, dtype=np.int32)
        name[sources] = targets
        is_valid = self.is_valid()
        self.entries[is_valid] = name[self.entries[is_valid]]
