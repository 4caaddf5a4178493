"""Write the keys and values of new tokens into their slots.

Moves, per layer: T tokens x 2 x num_kv_heads x head_dim numbers, read once and written once.
"""

import torch


def kv_write(
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Store one layer's keys and values; changes ``layer`` in place.

    Args:
        keys: shape (T, num_kv_heads, head_dim).
        values: shape (T, num_kv_heads, head_dim).
        layer: shape (num_blocks, 2, block_size, num_kv_heads, head_dim), any strides.
        block_ids: int64, shape (T,), physical block of each token.
        offsets: int64, shape (T,), its place in that block.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check_kv_write(keys, values, layer, block_ids, offsets)
    layer[:, 0].index_put_((block_ids, offsets), keys.to(layer.dtype))
    layer[:, 1].index_put_((block_ids, offsets), values.to(layer.dtype))


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
