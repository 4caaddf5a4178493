"""Compiles the CPU kernels: ``python3 kernels.py SOURCE_ROOT OUT all``, or names for ``all``.

A stage of its own in the Dockerfile, so that only a change of the kernels compiles them again. The
libraries get the names under which a wheel would bring them. Standard library alone.
"""

import platform
import sys
from pathlib import Path

if __name__ == "__main__":
    root, out, wanted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(",")
    sys.path[:0] = [str(root / name) for name in ("kernels", "shared")]
    from pageframe.kernels.cpu import build, isa
    from pageframe.kernels.cpu.compiler import compile_library, find_compiler

    out.mkdir(parents=True, exist_ok=True)
    compiler = find_compiler()
    for known in isa.known(platform.machine()):
        if known.name in wanted or (wanted == ["all"] and not known.is_for_tests):
            library = build.packaged_library(known, out)
            sys.stdout.write(f"{library.name}, {compiler.version}\n")
            sys.stdout.flush()
            compile_library(compiler, build.sources(), known.compiler_flags, library)
