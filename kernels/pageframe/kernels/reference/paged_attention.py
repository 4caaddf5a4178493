"""Reference of ``ops.paged_attention``: one token and one head at a time, in double precision."""

import numpy as np
import torch
from numpy.typing import NDArray


def paged_attention(
    query: torch.Tensor,
    layer: torch.Tensor,
    *,
    query_start: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    block_tables: NDArray[np.int32],
    scale: float,
    window: int | None = None,
    kv_scales: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of new tokens over paged keys and values.

    Args:
        query: shape (T, num_heads, head_dim); new tokens of all sequences, one after the other.
        layer: shape (num_blocks, 2, block_size, num_kv_heads, head_dim); the new tokens' own keys
            and values are already written.
        query_start: shape (S + 1,); sequence ``s`` owns tokens ``[query_start[s],
            query_start[s + 1])``.
        context_lens: shape (S,); positions of sequence ``s`` run over ``[0, context_lens[s])``.
        block_tables: shape (S, W); entries past a sequence's last block are undefined, and so are
            those whose positions all lie before the window of the sequence's first new token.
        scale: Multiplies scores before the softmax.
        window: A token sees itself and the ``window - 1`` positions before; None for all.
        kv_scales: shape (num_blocks, 2, block_size, num_kv_heads), or None.
        slopes: shape (num_heads,), what scores lose per position of distance (ALiBi, arXiv
            2108.12409); or None.

    Returns:
        shape (T, num_heads, head_dim), dtype of ``query``.
    """
    block_size, num_kv_heads = layer.shape[2], layer.shape[3]
    group_size = query.shape[1] // num_kv_heads
    output = torch.empty_like(query)
    for sequence, context_len in enumerate(context_lens.tolist()):
        first, end = int(query_start[sequence]), int(query_start[sequence + 1])
        table = block_tables[sequence]
        for token in range(first, end):
            position = context_len - (end - token)
            start = 0 if window is None else max(0, position - window + 1)
            # [positions seen, 2, num_kv_heads, head_dim], position after position.
            seen = torch.stack(
                [
                    _token(layer, kv_scales, int(table[at // block_size]), at % block_size)
                    for at in range(start, position + 1)
                ]
            )
            for head in range(query.shape[1]):
                keys, values = seen[:, :, head // group_size].unbind(1)
                scores = keys @ query[token, head].double() * scale
                if slopes is not None:
                    scores -= slopes[head] * torch.arange(position - start, -1, -1)
                weights = torch.softmax(scores, dim=0)
                output[token, head] = weights @ values
    return output


def _token(
    layer: torch.Tensor, kv_scales: torch.Tensor | None, block_id: int, offset: int
) -> torch.Tensor:
    """Keys and values of one token, [2, num_kv_heads, head_dim], in float64."""
    stored = layer[block_id, :, offset].double()
    return stored if kv_scales is None else stored * kv_scales[block_id, :, offset, :, None]
