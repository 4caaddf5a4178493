"""Residual addition and RMSNorm on a device: one pass over the residual stream."""

import torch

from pageframe.kernels.jit import residual_norm as kernel

SIZE_MAX = 16384
"""Channels of a row that one program holds."""


def residual_norm(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """``hidden += delta``, then ``out = rms_norm(hidden) * weight``; float32 inside.

    Args:
        hidden: shape (T, H), rows contiguous; changed in place if there is a ``delta``.
        delta: shape (T, H), or None.
        weight: shape (H,).
        epsilon: Added to the mean of squares.
        out: shape (T, H); written and returned. May be ``delta``.

    Raises:
        ValueError: shapes that do not belong together, or more than ``SIZE_MAX`` channels.
    """
    num_rows, size = hidden.shape
    given = (hidden, out) if delta is None else (hidden, delta, out)
    if any(rows.shape != hidden.shape for rows in given) or tuple(weight.shape) != (size,):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (*given, weight))
        raise ValueError(f"hidden states, results and weights of shapes {shapes}")
    if any(rows.stride(1) != 1 for rows in given) or size > SIZE_MAX:
        raise ValueError(f"rows must be contiguous and of at most {SIZE_MAX} channels, not {size}")
    tile = 1 << (size - 1).bit_length()
    if num_rows:
        kernel.residual_norm[(num_rows,)](
            hidden,
            hidden if delta is None else delta,
            weight,
            out,
            hidden.stride(0),
            hidden.stride(0) if delta is None else delta.stride(0),
            out.stride(0),
            epsilon,
            SIZE=size,
            TILE=tile,
            HAS_DELTA=delta is not None,
            num_warps=kernel.num_warps_of(tile),
        )
    return out
