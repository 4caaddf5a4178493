"""Who draws: PyTorch, or compiled kernels where this machine can have them."""

import pytest

from pageframe.kernels.cpu import library
from pageframe.kernels.cpu.draw import CpuDraw

PATHS = ["torch", "compiled"]


def kernels_of(path: str) -> CpuDraw | None:
    """What ``Draws`` and ``Sampler`` take for a path; or a skipped test."""
    if path == "torch":
        return None
    choice = library.choose()
    if choice.library is None:
        pytest.skip(choice.reason)
    return CpuDraw(choice.library, choice.library.create_pool(2))
