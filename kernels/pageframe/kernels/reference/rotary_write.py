"""Reference of ``ops.rotary_write``: one token and one head at a time, in double precision."""

import torch

from pageframe.kernels.reference.quantise import quantise


def rotary_write(
    heads: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    rotated: torch.Tensor,
    layer: torch.Tensor,
    slots: torch.Tensor,
    *,
    kv_scales: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """Arguments and result as in ``ops.rotary_write``."""
    num_heads, num_kv_heads = rotated.shape[1], layer.shape[3]
    block_size = layer.shape[2]
    for token, slot in enumerate(slots.tolist()):
        for head in range(heads.shape[1]):
            row = heads[token, head].double()
            if head < num_heads + num_kv_heads:
                if norm_weight is not None:
                    mean_square = row.square().mean()
                    row = row / torch.sqrt(mean_square + epsilon) * norm_weight[head].double()
                row = _turn(row, cosines[token].double(), sines[token].double())
            row = row.to(heads.dtype)
            if head < num_heads:
                rotated[token, head] = row
            elif slot >= 0:
                side, kv_head = divmod(head - num_heads, num_kv_heads)
                block_id, offset = divmod(slot, block_size)
                if kv_scales is None:
                    layer[block_id, side, offset, kv_head] = row
                else:
                    stored, scale = quantise(row, layer.dtype)
                    layer[block_id, side, offset, kv_head] = stored
                    kv_scales[block_id, side, offset, kv_head] = scale
    return rotated


def _turn(row: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Each pair of channels as a complex number, turned by its angle."""
    first, second = row.chunk(2)
    turned = torch.complex(first, second) * torch.complex(cosines, sines)
    return torch.cat((turned.real, turned.imag))
