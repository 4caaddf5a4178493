"""The ready line says what computes, so that nobody takes the slow way for the fast one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from integration.system import System
from pageframe.kernels.cpu.library import choose


def test_a_simulated_model_has_no_kernels(slow_system: System) -> None:
    assert "kernels" not in slow_system.details


@pytest.mark.parametrize("setting", ["auto", "torch"])
def test_the_ready_line_tells_compiled_kernels_from_torch(
    start: Callable[..., System], llama_system: System, setting: str
) -> None:
    system = start(Path(llama_system.model), "--cpu-kernels", setting, runner="native")

    is_compiled = choose(setting).library is not None
    assert system.details["kernels"] == ("fused" if is_compiled else "torch")
