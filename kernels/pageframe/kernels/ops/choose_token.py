"""Choose tokens on a device, without a round trip to the host; see ``jit.choose_token``."""

import torch

from pageframe.kernels.jit import choose_token as kernel


def choose_token(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    temperatures: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    seeds: torch.Tensor,
    sample_indices: torch.Tensor,
    positions: torch.Tensor,
    tile: int = kernel.TILE,
) -> torch.Tensor:
    """One token per row; nothing but ``tokens`` is written, and nothing is waited for.

    Args:
        logits: float32, shape (K, V), rows contiguous.
        tokens: int32, shape (K,); written and returned. -1 where a row has no finite best logit.
        temperatures: float32, shape (K,); zero for the best token, else a normal number.
        top_ks: int32, shape (K,), in ``[1, V]``; V keeps all.
        top_ps: float64, shape (K,), in ``(0, 1]``; 1 keeps all.
        min_ps: float32, shape (K,), in ``[0, 1]``.
        seeds: int64, shape (K,), the bits of the unsigned seeds.
        sample_indices: int64, shape (K,), in ``[0, 2**32)``.
        positions: int64, shape (K,), in ``[0, 2**32)``: the position that each token will take.
        tile: Numbers per step of a pass, a power of two.

    Raises:
        ValueError: a parameter has another shape or type.
    """
    num_rows, vocab_size = logits.shape
    wanted = (
        (tokens, torch.int32),
        (temperatures, torch.float32),
        (top_ks, torch.int32),
        (top_ps, torch.float64),
        (min_ps, torch.float32),
        (seeds, torch.int64),
        (sample_indices, torch.int64),
        (positions, torch.int64),
    )
    for column, dtype in wanted:
        if tuple(column.shape) != (num_rows,) or column.dtype != dtype:
            raise ValueError(f"{tuple(column.shape)} of {column.dtype} is no {dtype} per row")
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits of {logits.dtype} with strides {logits.stride()}")
    if num_rows:
        kernel.choose_token[(num_rows,)](
            logits,
            tokens,
            temperatures,
            top_ks,
            top_ps,
            min_ps,
            seeds,
            sample_indices,
            positions,
            logits.stride(0),
            vocab_size,
            TILE=tile,
            num_warps=kernel.NUM_WARPS,
        )
    return tokens
