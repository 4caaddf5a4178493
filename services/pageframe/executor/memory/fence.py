"""Blocks that nobody refers to any more but that a step in flight may still read or write.

The simple thing is to free a block when its last reference goes. With a device that runs behind the
host, the step launched last may still be writing to it, and the next owner would find foreign keys.
So every way to FREE leads through here. A batch of blocks carries a *ticket*, the number of the
step launched last when they were given up; when that step is known to have finished, they come out.
Tickets only grow, so the fence is a queue and clearing it looks at its head alone.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from pageframe.executor.block_moves import Int64Array
from pageframe.executor.memory.purpose import Purpose


@dataclass(slots=True)
class FencedBatch:
    """Blocks given up together; they come out together.

    Attributes:
        block_ids: int64 [n].
        ticket: The step that has to finish first.
        purpose: For whom and why they were given up, for the record of their freeing.
    """

    block_ids: Int64Array
    ticket: int
    purpose: Purpose


class Fence:
    """A queue of fenced batches, oldest ticket first."""

    def __init__(self) -> None:
        self._batches: deque[FencedBatch] = deque()

    def hold(self, block_ids: Int64Array, ticket: int, purpose: Purpose) -> None:
        """Keep ``block_ids`` until step ``ticket`` has finished."""
        assert not self._batches or self._batches[-1].ticket <= ticket, (
            f"ticket {ticket} after {self._batches[-1].ticket}"
        )
        self._batches.append(FencedBatch(block_ids, ticket, purpose))

    def clear(self, completed_ticket: int) -> list[FencedBatch]:
        """Let out every batch whose ticket is at most ``completed_ticket``, oldest first."""
        cleared: list[FencedBatch] = []
        while self._batches and self._batches[0].ticket <= completed_ticket:
            cleared.append(self._batches.popleft())
        return cleared

    def discard(self, block_ids: Int64Array) -> None:
        """Drop these ids wherever they wait; they will not come out. For faults only."""
        for batch in self._batches:
            batch.block_ids = batch.block_ids[~np.isin(batch.block_ids, block_ids)]

    def block_ids(self) -> Int64Array:
        """All waiting ids in a new array, oldest batch first."""
        if not self._batches:
            return np.empty(0, dtype=np.int64)
        return np.concatenate([batch.block_ids for batch in self._batches])
