"""SwiGLU on a device: one pass over a fused projection."""

import torch

from pageframe.kernels.jit import swiglu as kernel


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, computed in float32 and rounded once.

    Args:
        gate_up: shape (T, 2 * I), gates first, rows contiguous.
        out: shape (T, I), rows contiguous; written and returned.

    Raises:
        ValueError: shapes that do not belong together.
    """
    num_rows, num_channels = out.shape
    if tuple(gate_up.shape) != (num_rows, 2 * num_channels):
        raise ValueError(f"gate and up {tuple(gate_up.shape)} do not fit {tuple(out.shape)}")
    if gate_up.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("rows of gate and up, and of the result, must be contiguous")
    if num_rows:
        kernel.swiglu[num_rows, -(-num_channels // kernel.TILE)](
            gate_up,
            out,
            gate_up.stride(0),
            out.stride(0),
            num_channels,
            TILE=kernel.TILE,
            num_warps=kernel.NUM_WARPS,
        )
    return out
