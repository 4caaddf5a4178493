"""Blocks between a device and host slots while a step computes: staging, and who waits for whom.

    compute   gather ─┐             the step ...................... ┐   the next step
                      ▼                                             │   ▲
    copies            staging ─▶ slots    slots ─▶ staging ─▶ scatter ──┘ settle

The simple thing is to queue the copies in front of the step, which then waits for the slowest wire
of the machine. Here only the two kernels are near the step: ``gather`` packs the blocks that leave
into staging memory on the device, in one launch, and from then on the step may overwrite them.
What arrives goes into blocks that nobody may read before the step has ended, so ``scatter`` runs
beside the step, and whoever reads first asks for ``settle``.

Three rules, and nothing else, make that right:

    1. staging is sent once it is packed, and packed again once it was sent
    2. blocks are filled once everything queued before has read or written them
    3. blocks are read or moved once they are filled: ``settle``

Copies follow one another on their own stream, so a slot that is stored to and loaded from needs no
rule. Staging makes large pieces of small ones: slots that follow one another are one copy.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from numpy import int64
from numpy.typing import NDArray

NUM_BUFFERS = 2
"""One is packed while the other is sent."""

BUFFER_BYTES = 64 << 20
"""Of one buffer, at most, unless a single block is larger: about 1.3 ms at 50 GB/s."""


class Event(Protocol):
    """A mark in a stream."""

    def synchronize(self) -> None:
        """Have this thread wait until the stream has come to it."""
        ...


class Stream(Protocol):
    """A queue of work on a device, done in order."""

    def record(self) -> Event:
        """A mark behind all that is queued."""
        ...

    def wait(self, event: Event) -> None:
        """Begin nothing that is queued from now on before ``event``; this thread goes on."""
        ...

    def running(self) -> AbstractContextManager[object]:
        """Queue here what is launched inside the block."""
        ...


class Mover(Protocol):
    """Launches on the stream that is running."""

    def move_rows(
        self,
        source: torch.Tensor,
        source_rows: NDArray[int64],
        target: torch.Tensor,
        target_rows: NDArray[int64],
    ) -> None:
        """Copy rows on the device, all in one launch; see ``kernels.ops.move_rows``."""
        ...

    def send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy one piece between the device and pinned memory."""
        ...


def buffer_rows(num_slots: int, block_bytes: int) -> int:
    """Rows of one staging buffer."""
    return min(num_slots, max(1, BUFFER_BYTES // block_bytes))


def staging_bytes(num_slots: int, block_bytes: int) -> int:
    """Memory of the device that staging takes, beside that of the pool."""
    return NUM_BUFFERS * buffer_rows(num_slots, block_bytes) * block_bytes


class SwapCopies:
    """Queues copies out and in, and keeps them in order with the steps.

    Args:
        slots: uint8, shape (num_slots, block_bytes), pinned.
        buffers: Staging on the device, each uint8, shape (rows, block_bytes), rows alike.
        compute: Where steps run.
        copies: Where nothing else runs.
        mover: Launches.
    """

    def __init__(
        self,
        slots: torch.Tensor,
        buffers: list[torch.Tensor],
        *,
        compute: Stream,
        copies: Stream,
        mover: Mover,
    ) -> None:
        self._slots = slots
        self._buffers = buffers
        self._sent: list[Event | None] = [None] * len(buffers)
        self._next = 0
        self._compute = compute
        self._copies = copies
        self._mover = mover
        self._arrival: Event | None = None

    def store(self, blocks: torch.Tensor, sources: NDArray[int64], slots: NDArray[int64]) -> None:
        """Queue copies of blocks to slots; the blocks may be written by whatever is queued next.

        Args:
            blocks: uint8, shape (num_blocks, block_bytes).
            sources: int64, shape (O,), blocks.
            slots: int64, shape (O,), none twice.
        """
        self.settle()
        for rows, into in self._parts(sources, slots):
            index = self._take_buffer()
            buffer, sent = self._buffers[index], self._sent[index]
            if sent is not None:
                self._compute.wait(sent)
            with self._compute.running():
                self._mover.move_rows(blocks, rows, buffer, np.arange(len(rows)))
            self._copies.wait(self._compute.record())
            with self._copies.running():
                for first, end, slot in _runs(into):
                    self._mover.send(buffer[first:end], self._slots[slot : slot + end - first])
            self._sent[index] = self._copies.record()

    def load(self, blocks: torch.Tensor, slots: NDArray[int64], targets: NDArray[int64]) -> None:
        """Queue copies of slots to blocks; nobody may read those before ``settle``.

        Args:
            blocks: uint8, shape (num_blocks, block_bytes).
            slots: int64, shape (I,).
            targets: int64, shape (I,), blocks, none twice.
        """
        before: Event | None = self._compute.record()
        for rows, source in self._parts(targets, slots):
            # Whatever else used this buffer did so on the stream of copies, or before it did.
            index = self._take_buffer()
            buffer = self._buffers[index]
            with self._copies.running():
                for first, end, slot in _runs(source):
                    self._mover.send(self._slots[slot : slot + end - first], buffer[first:end])
                if before is not None:
                    self._copies.wait(before)
                    before = None
                self._mover.move_rows(buffer, np.arange(len(rows)), blocks, rows)
            self._sent[index] = self._copies.record()
        self._arrival = self._copies.record()

    def settle(self) -> None:
        """What is queued from now on to compute sees all blocks that were loaded."""
        if self._arrival is not None:
            self._compute.wait(self._arrival)
            self._arrival = None

    def finish(self) -> None:
        """Have this thread wait for all copies."""
        self._copies.record().synchronize()

    def _take_buffer(self) -> int:
        index = self._next
        self._next = (index + 1) % len(self._buffers)
        return index

    def _parts(
        self, rows: NDArray[int64], slots: NDArray[int64]
    ) -> Iterator[tuple[NDArray[int64], NDArray[int64]]]:
        """Pairs in the order of slots, so that neighbours meet; at most a buffer full at once."""
        order = np.argsort(slots, kind="stable")
        size = self._buffers[0].shape[0]
        for first in range(0, len(order), size):
            part = order[first : first + size]
            yield rows[part], slots[part]


def _runs(slots: NDArray[int64]) -> Iterator[tuple[int, int, int]]:
    """Pieces of slots that follow one another: first and end in ``slots``, and the first slot."""
    firsts = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist()]
    for first, end in zip(firsts, [*firsts[1:], len(slots)], strict=True):
        yield first, end, int(slots[first])
