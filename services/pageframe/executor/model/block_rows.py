"""Copies of whole rows of bytes from one memory to another: a row is a block or a host slot.

One copy per row, because a row is large: the default model's block takes 369 KB. Gathering rows
with ``index_select`` and scattering them with ``index_copy_`` goes element by element and holds
all rows twice; ``bench/block_moves.py`` found it 9 to 30 times as slow with rows of that size, and
copies through memoryviews no faster.
"""

import torch
from numpy import int64
from numpy.typing import NDArray


def copy_rows(
    source: torch.Tensor,
    source_rows: NDArray[int64],
    target: torch.Tensor,
    target_rows: NDArray[int64],
) -> None:
    """Copy row ``source_rows[i]`` of ``source`` to row ``target_rows[i]`` of ``target``.

    With a device on one side the copies are queued on its current stream, in order; the host side
    should be pinned then.

    Args:
        source: uint8, shape (num_rows, row_bytes).
        source_rows: int64, shape (N,).
        target: The same as ``source``, of another memory.
        target_rows: int64, shape (N,), no row twice.
    """
    for source_row, target_row in zip(source_rows.tolist(), target_rows.tolist(), strict=True):
        target[target_row].copy_(source[source_row], non_blocking=True)
