"""Reference of ``ops.copy_blocks``: one block at a time."""

import torch


def copy_blocks(arena: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy blocks; arguments as in ``ops.copy_blocks``."""
    before = arena.clone()
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        arena[target] = before[source]
