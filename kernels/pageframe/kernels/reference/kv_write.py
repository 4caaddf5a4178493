"""Reference of ``ops.kv_write``: one token at a time."""

import torch


def kv_write(
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Store one layer's keys and values; arguments as in ``ops.kv_write``."""
    for token, (block_id, offset) in enumerate(
        zip(block_ids.tolist(), offsets.tolist(), strict=True)
    ):
        layer[block_id, 0, offset] = keys[token]
        layer[block_id, 1, offset] = values[token]
