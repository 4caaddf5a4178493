"""Reference of ``ops.kv_gather``: one token and one head at a time, in double precision."""

import torch


def kv_gather(
    side: torch.Tensor, side_scales: torch.Tensor | None, block_ids: torch.Tensor
) -> torch.Tensor:
    """Gather blocks; arguments as in ``ops.kv_gather.KvGather.gather``, result in float64."""
    _, block_size, num_kv_heads, head_dim = side.shape
    gathered = torch.empty(
        block_ids.shape[0], block_size, num_kv_heads, head_dim, dtype=torch.float64
    )
    for place, block_id in enumerate(block_ids.tolist()):
        for offset in range(block_size):
            for head in range(num_kv_heads):
                row = side[block_id, offset, head].double()
                if side_scales is not None:
                    row = row * side_scales[block_id, offset, head].double()
                gathered[place, offset, head] = row
    return gathered.flatten(0, 1)
