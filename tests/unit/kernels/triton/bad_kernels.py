"""Kernels that must not serve, judged as the gate does; prints the verdicts as JSON by name.

Run as a program: compiling needs a process in which kernels are not interpreted.
"""

import json
import sys

import triton
import triton.language as tl

from pageframe.kernels.gate.__main__ import judge
from pageframe.kernels.jit.variants import Gate, Variant

_POINTERS = {"left": "*fp16", "right": "*fp16", "out": "*fp32"}


@triton.jit
def product(left, right, out, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile of a matrix product over 512 channels."""
    row, column, channel = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, 64)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, 512, 64):
        a = tl.load(left + row[:, None] * stride + first + channel[None, :])
        b = tl.load(right + column[None, :] * stride + first + channel[:, None])
        sums = tl.dot(a, b, sums)
    tl.store(out + row[:, None] * COLUMNS + column[None, :], sums)


@triton.jit
def to_fp8(left, out, SIZE: tl.constexpr):
    """A conversion that no chip before Ada has."""
    place = tl.arange(0, SIZE)
    tl.store(out + place, tl.load(left + place).to(tl.float8e4nv))


def _product(name, *, rows, columns, num_warps, hinted=True):
    gate = Gate(needs_tensor_cores=True, needs_wgmma=True, registers_max=200)
    return Variant(
        name=name,
        kernel=product,
        signature={
            **_POINTERS,
            "stride": "i32",
            "ROWS": "constexpr",
            "COLUMNS": "constexpr",
        },
        constexprs={"ROWS": rows, "COLUMNS": columns},
        divisible_by_16=frozenset({*_POINTERS, "stride"} if hinted else ()),
        capability=90,
        num_warps=num_warps,
        gate=gate,
    )


VARIANTS = [
    _product("good", rows=64, columns=64, num_warps=4),
    _product("spilling", rows=64, columns=128, num_warps=1),
    _product("without wgmma", rows=16, columns=64, num_warps=4),
    _product("narrow loads", rows=64, columns=64, num_warps=4, hinted=False),
    Variant(
        name="not there yet",
        kernel=to_fp8,
        signature={"left": "*fp32", "out": "*fp8e4nv", "SIZE": "constexpr"},
        constexprs={"SIZE": 128},
        capability=80,
    ),
]


if __name__ == "__main__":
    json.dump({variant.name: judge(variant).faults for variant in VARIANTS}, sys.stdout)
