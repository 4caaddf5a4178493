"""Triton kernels run through Triton's interpreter, except where a device is asked for."""

import contextlib
import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Choose before any kernel is defined: a kernel cannot change over later."""
    if config.getoption("markexpr") != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
    # Triton's own default, said aloud: later versions warn where it is left open.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    # Tests start services from processes that have used gRPC; see cli/spawn.py.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # On a machine that is there for its GPU alone, where nobody misses it, it may be missing.
    with contextlib.suppress(ImportError):
        _take_time_for_examples()


def _take_time_for_examples() -> None:
    """How long an example takes is a matter of the machine, and of what else it does."""
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow]
    settings.register_profile("any machine", deadline=None, suppress_health_check=slow)
    settings.load_profile("any machine")
