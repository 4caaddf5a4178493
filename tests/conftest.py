"""Triton kernels run through Triton's interpreter, except where a device is asked for."""

import os

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is a matter of the machine, and of what else it does.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    """Choose before any kernel is defined: a kernel cannot change over later."""
    if config.getoption("markexpr") != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
    # Triton's own default, said aloud: later versions warn where it is left open.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
