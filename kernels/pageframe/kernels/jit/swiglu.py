"""SwiGLU: ``silu(gate) * up`` of a fused projection, in one pass.

    gate_up   [ gate 0 ......... gate I-1 | up 0 ......... up I-1 ]     a row
    out       [ silu(gate) * up ......... ]

Budget: per row 2 I numbers are read and I written, about 8 I operations and one exponential each;
bound by memory on every device. Separate operations read and write twice as much.

After Shazeer, "GLU variants improve transformer" (2020).
"""

import triton
import triton.language as tl

# Constants of every launch; the compile gate compiles with the same. One load of 16 bytes per
# thread and side, if numbers take two bytes.
TILE = 1024
NUM_WARPS = 4


@triton.jit
def swiglu(
    gate_up,
    out,
    gate_up_stride,
    out_stride,
    num_channels,
    TILE: tl.constexpr,
):
    """One tile of one row; the arithmetic is float32 and is rounded once.

    Args:
        gate_up: [T, 2 * num_channels].
        out: [T, num_channels].
        gate_up_stride: From a row to the next, in elements.
        out_stride: From a row to the next, in elements.
        num_channels: I.
        TILE: Channels per program, a power of two.

    Grid: (T, ceil(num_channels / TILE)).
    """
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_inside = channels < num_channels
    gates = gate_up + row * gate_up_stride + channels
    gate = tl.load(gates, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gates + num_channels, mask=is_inside, other=0.0).to(tl.float32)
    activated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * out_stride + channels, activated.to(out.dtype.element_ty), mask=is_inside)
