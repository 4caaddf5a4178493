"""Compile a variant for its chip, and read what came out: registers, memory, instructions.

Needs Triton and the tools inside its package, and neither PyTorch nor a driver.
"""

import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pageframe.kernels.jit.variants import Variant

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WARP_SIZE = 32
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
# An instruction as nvdisasm prints it: behind the address, behind a predicate if there is one.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCode:
    """What a variant became.

    Attributes:
        registers: Per thread.
        stack_bytes: Per thread; spilled registers lie there.
        shared_bytes: Per program.
        instructions: How often each instruction stands in the code, with its modifiers: for
            example ``LDG.E.128``.
        seconds: What compiling took; near zero if Triton had it in its cache.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: Mapping[str, int]
    seconds: float

    def count(self, *names: str) -> int:
        """Instructions of these names, whatever their modifiers."""
        return sum(
            number for text, number in self.instructions.items() if text.split(".")[0] in names
        )

    def count_wide(self, *names: str) -> int:
        """Those of ``count`` that move 16 bytes or more per thread."""
        return sum(
            number
            for text, number in self.instructions.items()
            if text.split(".")[0] in names and re.search(r"\.(128|256)\b", text)
        )


class CompileError(Exception):
    """A variant that does not compile; the message is the compiler's, in one line."""


def compile_variant(variant: Variant) -> MachineCode:
    """Compile for the variant's capability.

    Raises:
        CompileError: Triton or the assembler refuse it.
    """
    names = list(variant.signature)
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible_by_16}
    source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constexprs), hints)
    start = time.monotonic()
    try:
        compiled: Any = triton.compile(
            source,
            target=GPUTarget("cuda", variant.capability, _WARP_SIZE),
            options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
        )
    # The compiler's own exceptions share no base class.
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise CompileError(f"{type(error).__name__}: {lines[-1][:200]}") from error
    seconds = time.monotonic() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = _RESOURCES.search(_output("cuobjdump", "--dump-resource-usage", file.name))
        listing = _output("nvdisasm", "-c", file.name)
    assert resources, f"cuobjdump names no registers of {variant.name}"
    return MachineCode(
        registers=int(resources[1]),
        stack_bytes=int(resources[2]),
        shared_bytes=int(compiled.metadata.shared),
        instructions=dict(Counter(_INSTRUCTION.findall(listing))),
        seconds=seconds,
    )


def _output(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout
