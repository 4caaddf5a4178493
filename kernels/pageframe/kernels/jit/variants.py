"""What a compiled kernel is made of, as data: a gate without a GPU can compile all that serves.

A variant is one kernel with everything that decides its machine code: types of arguments, values
of constants, warps, stages, and the chip. ``ops`` launches with the same constants that the lists
of variants are made from, so what passes the gate is what runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Shared memory that one program may have, by compute capability (CUDA programming guide, table of
# technical specifications). Turing, Ampere A100 and consumer, Ada, Hopper, Blackwell and consumer.
SHARED_BYTES_MAX: Mapping[int, int] = {
    75: 64 << 10,
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}
# bfloat16 products begin with Ampere, conversions from fp8 with Ada.
BF16_CAPABILITY_MIN = 80
FP8_CAPABILITY_MIN = 89


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What the machine code of a variant has to look like.

    No variant may spill or use more shared memory than its chip has; these come on top.

    Attributes:
        registers_max: Per thread.
        needs_tensor_cores: Some matrix product instruction has to be there.
        needs_wgmma: On capability 90 it has to be HGMMA, the asynchronous one.
        needs_wide_loads: Some load or asynchronous copy has to move 16 bytes per thread.
    """

    registers_max: int = 255
    needs_tensor_cores: bool = False
    needs_wgmma: bool = False
    needs_wide_loads: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One kernel, ready to compile.

    Attributes:
        name: Unique among the variants of a capability.
        kernel: The function under ``triton.jit``.
        signature: Type of each argument in order, as Triton writes it: "*bf16", "i32", "fp32", or
            "constexpr".
        constexprs: Value of each "constexpr" argument.
        divisible_by_16: Arguments (addresses or integers) that are multiples of 16.
        capability: Compute capability times ten.
        num_warps: Warps per program.
        num_stages: Tiles in flight per loop.
        gate: What the result has to look like.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    divisible_by_16: frozenset[str] = frozenset()
    capability: int
    num_warps: int = 4
    num_stages: int = 1
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        """Constants have values, and nothing else has."""
        constants = {name for name, kind in self.signature.items() if kind == "constexpr"}
        assert constants == set(self.constexprs), (self.name, constants ^ set(self.constexprs))
        assert self.capability in SHARED_BYTES_MAX, f"{self.name}: sm_{self.capability}"
