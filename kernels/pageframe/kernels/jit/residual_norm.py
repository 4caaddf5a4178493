"""Add what a layer gave to the residual stream, and normalise the sum for the next: one pass.

    hidden  ──(+)──▶ hidden, in place ──▶ RMSNorm ──▶ normed
    delta ───┘

Budget: per row of H numbers, two rows are read and two written (without ``delta`` one and one),
about 4 H operations; bound by memory. Separate operations read the sum twice more.

After Zhang and Sennrich, "Root mean square layer normalization" (NeurIPS 2019).
"""

import triton
import triton.language as tl


def num_warps_of(tile: int) -> int:
    """Warps for a row of ``tile`` channels: 16 numbers a thread, within what a program may have."""
    return min(max(tile // 512, 1), 16)


@triton.jit
def residual_norm(
    hidden,
    delta,
    weight,
    normed,
    hidden_stride,
    delta_stride,
    normed_stride,
    epsilon,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    """One row. The sum is rounded to the type of ``hidden`` before it is normalised.

    Args:
        hidden: [T, SIZE], changed in place if there is a ``delta``.
        delta: [T, SIZE]; not read without ``HAS_DELTA``.
        weight: [SIZE].
        normed: [T, SIZE].
        hidden_stride: From a row to the next, in elements.
        delta_stride: From a row to the next, in elements.
        normed_stride: From a row to the next, in elements.
        epsilon: Added to the mean of squares.
        SIZE: Channels of a row.
        TILE: The next power of two.
        HAS_DELTA: Whether there is something to add.

    Grid: (T,).
    """
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, TILE)
    is_inside = channels < SIZE
    at = hidden + row * hidden_stride + channels
    numbers = tl.load(at, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        added = tl.load(delta + row * delta_stride + channels, mask=is_inside, other=0.0)
        rounded = (numbers + added.to(tl.float32)).to(hidden.dtype.element_ty)
        tl.store(at, rounded, mask=is_inside)
        numbers = rounded.to(tl.float32)
    mean_square = tl.sum(numbers * numbers, 0) / SIZE
    factor = tl.load(weight + channels, mask=is_inside, other=0.0).to(tl.float32)
    scaled = numbers * tl.rsqrt(mean_square + epsilon) * factor
    to = normed + row * normed_stride + channels
    tl.store(to, scaled.to(normed.dtype.element_ty), mask=is_inside)
