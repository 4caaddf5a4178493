"""Libraries that tests compute with: every instruction set that this machine can run."""

import pytest

from pageframe.kernels.cpu import isa
from pageframe.kernels.cpu.library import CpuLibrary, load

USABLE = [known.name for known in isa.usable(isa.cpu_flags())]


def loaded(name: str) -> CpuLibrary:
    """The library, or a skipped test where there is no compiler."""
    try:
        return load(name)
    except Exception as error:
        if getattr(error, "reason", "") != "NO_COMPILER":
            raise
        pytest.skip("there is no C++ compiler")
