"""Puts compiled CPU kernels into a wheel: one library per instruction set.

Without a compiler the wheel is made all the same, for any machine: the kernels are then compiled
where it is installed, or PyTorch computes. An editable installation compiles at first use.
"""

import platform
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SOURCE_ROOTS = ("kernels", "shared")
_EDITABLE = "editable"


class CpuKernelsHook(BuildHookInterface):
    """The hook ``custom`` of the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile and enter the libraries and the wheel's tag."""
        if version == _EDITABLE or sys.platform != "linux":
            return
        sys.path[:0] = [str(Path(self.root) / name) for name in _SOURCE_ROOTS]
        from pageframe.core.errors import PageframeError
        from pageframe.kernels.cpu import build, isa
        from pageframe.kernels.cpu.compiler import compile_library, find_compiler

        self._folder = tempfile.TemporaryDirectory(prefix="pageframe-kernels-")
        try:
            compiler = find_compiler()
            for known in isa.known(platform.machine()):
                if known.is_for_tests:
                    continue
                name = build.packaged_library(known).name
                made = Path(self._folder.name) / name
                self.app.display_info(f"compiling CPU kernels: {known.name}")
                compile_library(compiler, build.sources(), known.compiler_flags, made)
                build_data["force_include"][str(made)] = f"pageframe/kernels/cpu/lib/{name}"
        except PageframeError as error:
            build_data["force_include"].clear()
            self.app.display_warning(f"CPU kernels are not in this wheel: {error.message}")
            return
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled; the wheel has it."""
        if folder := getattr(self, "_folder", None):
            folder.cleanup()
