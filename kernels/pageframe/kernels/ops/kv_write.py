"""Write the keys and values of new tokens into their slots.

Moves, per layer: T tokens x 2 x num_kv_heads x head_dim numbers, read once and written once; in
a quantised pool one byte each is written, and a scale per token, head and side.
"""

import torch

from pageframe.kernels.ops.quantise import as_bytes, check_scales, quantise


def kv_write(
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
    *,
    kv_scales: torch.Tensor | None = None,
) -> None:
    """Store one layer's keys and values; changes ``layer`` and ``kv_scales`` in place.

    Args:
        keys: shape (T, num_kv_heads, head_dim).
        values: shape (T, num_kv_heads, head_dim).
        layer: shape (num_blocks, 2, block_size, num_kv_heads, head_dim), any strides.
        block_ids: int64, shape (T,), physical block of each token.
        offsets: int64, shape (T,), its place in that block.
        kv_scales: float32, shape (num_blocks, 2, block_size, num_kv_heads), any strides; None
            exactly if ``layer`` is of no quantised type.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check_kv_write(keys, values, layer, block_ids, offsets)
    check_scales(layer, kv_scales)
    if kv_scales is None:
        layer[:, 0].index_put_((block_ids, offsets), keys.to(layer.dtype))
        layer[:, 1].index_put_((block_ids, offsets), values.to(layer.dtype))
        return
    # [T, 2, num_kv_heads, head_dim]: both sides at once halve the number of small operations.
    stored, scales = quantise(torch.stack((keys, values), dim=1), layer.dtype)
    as_bytes(layer).transpose(1, 2).index_put_((block_ids, offsets), as_bytes(stored))
    kv_scales.transpose(1, 2).index_put_((block_ids, offsets), scales)


def _check_kv_write(
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    expected = (block_ids.shape[0], *layer.shape[3:])
    if layer.dim() != 5 or layer.shape[1] != 2:
        raise ValueError(f"layer has shape {tuple(layer.shape)}; see layouts.py")
    if tuple(keys.shape) != expected or tuple(values.shape) != expected:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must both be {expected}"
        )
    if block_ids.shape != offsets.shape:
        raise ValueError(f"{block_ids.shape[0]} block ids for {offsets.shape[0]} offsets")
