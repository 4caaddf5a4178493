"""Which blocks are free.

The simple thing is a Python list: ``pop()`` and ``append()``, one object per block. A step takes
and returns whole runs of blocks, so the list is kept as a stack in one preallocated NumPy array:
taking and giving back ``n`` blocks is one slice copy, and nothing happens per block.

    stack  [ 7 | 6 | 5 | 2 | 9 | . | . | . ]
                             ▲ size = 5: the next block taken is 9

Last in, first out: a block that was just freed is the likeliest to be in a CPU cache, and a pool
that is never full touches only as many pages of its arena as it really needs.

Ids are int64 although int32 would do: NumPy indexes by int64, and converts other indices in every
call, which costs more than the call itself.
"""

import numpy as np

from pageframe.executor.block_moves import Int64Array


class FreeList:
    """A stack of block ids, all of ``[0, num_blocks)`` at first; block 0 is taken first."""

    def __init__(self, num_blocks: int, num_blocks_max: int = 0) -> None:
        """There is room for ``num_blocks_max`` ids, should the pool grow; 0 for no growth."""
        self._stack: Int64Array = np.zeros(max(num_blocks, num_blocks_max), dtype=np.int64)
        self._stack[:num_blocks] = np.arange(num_blocks - 1, -1, -1, dtype=np.int64)
        self._size = num_blocks

    def __len__(self) -> int:
        return self._size

    def pop(self, num_blocks: int) -> Int64Array:
        """Take ``num_blocks`` ids, int64 [num_blocks]; the caller owns the array."""
        assert 0 <= num_blocks <= self._size, f"{num_blocks} of {self._size} free blocks"
        rest = self._size - num_blocks
        taken = self._stack[rest : self._size][::-1].copy()
        self._size = rest
        return taken

    def push(self, block_ids: Int64Array) -> None:
        """Give ids back, int64 [n]; none of them may be on the list already."""
        size = self._size + len(block_ids)
        assert size <= len(self._stack), f"{size} free blocks of {len(self._stack)}"
        self._stack[self._size : size] = block_ids
        self._size = size

    def discard(self, block_ids: Int64Array) -> None:
        """Take these ids off the list wherever they stand. Walks the list: for faults only."""
        kept = self._stack[: self._size]
        kept = kept[~np.isin(kept, block_ids)]
        self._size = len(kept)
        self._stack[: self._size] = kept

    def block_ids(self) -> Int64Array:
        """A view of all ids, bottom of the stack first; valid until the next change."""
        return self._stack[: self._size]
