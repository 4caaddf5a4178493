"""Which physical block holds which part of each running sequence.

One persistent int32 matrix, a row per running sequence: the batch of a step takes its rows with one
indexing operation, and a device can keep a mirror of it at a fixed address.

    row r   [ 12 | 3 | 40 | ? | ? | ? ]      num_blocks[r] = 3; entries behind it are undefined
              └ positions [0, B)   └ positions [2B, 3B)

Blocks that a sliding window has left behind are given up from the front: ``first_block[r]`` counts
them, and entries before it are undefined too.
"""

import numpy as np
from numpy.typing import NDArray

from pageframe.core.units import ceil_div
from pageframe.executor.batch import Int32Array


class BlockTables:
    """Block tables of all rows.

    Attributes:
        block_size: Tokens per block.
        entries: int32 [num_rows, W], W blocks hold the longest possible sequence.
        num_blocks: int32 [num_rows], where the valid entries of each row end.
        first_block: int32 [num_rows], where they begin.
    """

    def __init__(self, num_rows: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        width = ceil_div(max_model_len, block_size)
        self.entries: Int32Array = np.zeros((num_rows, width), dtype=np.int32)
        self.num_blocks: Int32Array = np.zeros(num_rows, dtype=np.int32)
        self.first_block: Int32Array = np.zeros(num_rows, dtype=np.int32)

    def blocks_of(self, row: int) -> Int32Array:
        """A view of the row's blocks, int32 [n], head first; valid until the next change."""
        return self.entries[row, self.first_block[row] : self.num_blocks[row]]

    def is_valid(self) -> NDArray[np.bool_]:
        """Which entries of all rows are valid: bool [num_rows, W]. For checks and resizes."""
        column = np.arange(self.entries.shape[1])
        behind_first: NDArray[np.bool_] = column >= self.first_block[:, np.newaxis]
        return behind_first & (column < self.num_blocks[:, np.newaxis])

    def num_missing(self, row: int, num_tokens: int) -> int:
        """Blocks that the row lacks to hold ``num_tokens`` tokens."""
        return max(0, ceil_div(num_tokens, self.block_size) - int(self.num_blocks[row]))

    def rows_at_boundary(self, rows: Int32Array, num_computed: Int32Array) -> Int32Array:
        """Those of ``rows`` whose next token lies behind their last block.

        Args:
            rows: int32 [n].
            num_computed: int32 [num_rows], computed tokens of every row.
        """
        is_at_boundary: NDArray[np.bool_] = (
            num_computed[rows] >= self.num_blocks[rows] * self.block_size
        )
        return rows[is_at_boundary]

    def append(self, row: int, block_ids: Int32Array) -> None:
        """Add blocks to the end of one row."""
        start = int(self.num_blocks[row])
        end = start + len(block_ids)
        assert end <= self.entries.shape[1], f"{end} blocks in a row of {self.entries.shape[1]}"
        self.entries[row, start:end] = block_ids
        self.num_blocks[row] = end

    def append_each(self, rows: Int32Array, block_ids: Int32Array) -> None:
        """Add one block to each of ``rows``; both int32 [n], rows without repetition."""
        self.entries[rows, self.num_blocks[rows]] = block_ids
        self.num_blocks[rows] += 1

    def fill(self, row: int, block_ids: Int32Array, first_block: int = 0) -> None:
        """Begin an empty row; ``block_ids[0]`` is its logical block ``first_block``."""
        assert not self.num_blocks[row], f"row {row} holds {self.num_blocks[row]} blocks"
        end = first_block + len(block_ids)
        self.entries[row, first_block:end] = block_ids
        self.first_block[row] = first_block
        self.num_blocks[row] = end

    def cut_tail(self, row: int, num_blocks: int) -> Int32Array:
        """Keep the first ``num_blocks`` logical blocks; returns what was behind, head first."""
        start = max(num_blocks, int(self.first_block[row]))
        block_ids = self.entries[row, start : self.num_blocks[row]].copy()
        self.num_blocks[row] = start
        return block_ids

    def cut_head(self, row: int, first_block: int) -> Int32Array:
        """Give up what is before logical block ``first_block``; returns it, head first."""
        block_ids = self.entries[row, self.first_block[row] : first_block].copy()
        self.first_block[row] = first_block
        return block_ids

    def clear(self, row: int) -> Int32Array:
        """Empty one row and return what it held, in a new array."""
        block_ids = self.blocks_of(row).copy()
        self.num_blocks[row] = self.first_block[row] = 0
        return block_ids

    def rename(self, sources: Int32Array, targets: Int32Array, num_blocks_max: int) -> None:
        """Blocks have moved: name each source by its target. Walks all rows."""
        name: Int32Array = np.arange(num_blocks_max, dtype=np.int32)
        name[sources] = targets
        is_valid = self.is_valid()
        self.entries[is_valid] = name[self.entries[is_valid]]
