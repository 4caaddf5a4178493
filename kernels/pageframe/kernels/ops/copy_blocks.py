"""Copy whole blocks inside the arena, over all layers: copy-on-write and compaction.

Moves C blocks, each read once and written once, contiguous over all layers.
"""

import torch


def copy_blocks(arena: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy block ``sources[i]`` to block ``targets[i]`` for all ``i``; changes ``arena`` in place.

    Every source is read before any target is written, so a target may be another copy's source.

    Args:
        arena: shape (num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim).
        sources: int64, shape (C,).
        targets: int64, shape (C,), no block twice.

    Raises:
        ValueError: numbers of sources and targets differ.
    """
    if sources.shape != targets.shape:
        raise ValueError(f"{sources.shape[0]} sources for {targets.shape[0]} targets")
    arena.index_copy_(0, targets, arena.index_select(0, sources))
