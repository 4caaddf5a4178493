"""Instruction sets that the CPU kernels are compiled for: one library each, from the same sources.

    baseline ─▶ avx2 ─▶ avx512 ─▶ avx512bf16        each needs what stands left of it

Nothing is dispatched inside a library: Python asks the machine once and loads the best one. Other
processors than x86-64 have ``baseline`` alone, with the vectors that their compiler takes for
granted (NEON on aarch64). ``avx512-emulated`` is for tests: code for AVX-512, split by the compiler
into AVX2 instructions, with portable twins for the few instructions that have no counterpart.

Standard library only: the build of a wheel imports this before anything is installed.
"""

import platform
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """One set of instructions: how the kernel of Linux and how compilers call its parts."""

    name: str
    cpu_flags: frozenset[str]
    compiler_flags: tuple[str, ...]
    is_for_tests: bool = False


_BASELINE_CPU = frozenset({"sse4_2", "ssse3", "popcnt"})
_AVX2_CPU = _BASELINE_CPU | {"avx2", "fma", "f16c", "bmi1", "bmi2"}
_AVX512_CPU = _AVX2_CPU | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_BASELINE = ("-msse4.2", "-mpopcnt")
_AVX2 = (*_BASELINE, "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl")

X86_64 = (
    InstructionSet(
        "avx512bf16",
        _AVX512_CPU | {"avx512_bf16", "avx512_vnni"},
        (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
    ),
    InstructionSet("avx512", _AVX512_CPU, _AVX512),
    InstructionSet(
        "avx512-emulated",
        _AVX2_CPU,
        (*_AVX2, "-DPF_LANES=16", "-DPF_PAIR_ROWS"),
        is_for_tests=True,
    ),
    InstructionSet("avx2", _AVX2_CPU, _AVX2),
    InstructionSet("baseline", _BASELINE_CPU, _BASELINE),
)
"""Best first."""
OTHERS = (InstructionSet("baseline", frozenset(), ()),)

NAMES = tuple(isa.name for isa in reversed(X86_64) if not isa.is_for_tests)
"""All that a person may choose, on whatever machine; the simplest first."""


def known(machine: str = "") -> tuple[InstructionSet, ...]:
    """Sets that libraries can be compiled for on a kind of machine, best first.

    Args:
        machine: As ``platform.machine()`` has it; this machine's unless given.
    """
    return X86_64 if (machine or platform.machine()) in ("x86_64", "AMD64") else OTHERS


def cpu_flags(path: Path = _CPUINFO) -> frozenset[str]:
    """What the processors say they can; empty where nobody tells."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    named = [line.partition(":")[2].split() for line in lines if line.startswith("flags")]
    # All processors of a machine, should they differ.
    return frozenset.intersection(*map(frozenset, named)) if named else frozenset()


def usable(flags: frozenset[str], machine: str = "") -> tuple[InstructionSet, ...]:
    """Sets that a machine with such flags can run, best first."""
    return tuple(isa for isa in known(machine) if isa.cpu_flags <= flags)
