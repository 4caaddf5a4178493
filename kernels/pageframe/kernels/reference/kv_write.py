"""Reference of ``ops.kv_write``: one token at a time."""

import torch

from pageframe.kernels.reference.quantise import quantise


def kv_write(
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
    *,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """Store one layer's keys and values; arguments as in ``ops.kv_write``."""
    for token, (block_id, offset) in enumerate(
        zip(block_ids.tolist(), offsets.tolist(), strict=True)
    ):
        for side, row in enumerate((keys[token], values[token])):
            if kv_scales is None:
                layer[block_id, side, offset] = row
            else:
                stored, scales = quantise(row, layer.dtype)
                layer[block_id, side, offset] = stored
                kv_scales[block_id, side, offset] = scales
