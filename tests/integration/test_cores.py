"""Where there are fewer cores than busy threads, services wait, and the kernels do not."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.system import SERVICES, System
from pageframe.kernels.cpu.library import choose


def policies(system: System, service: str) -> Counter[int]:
    """How many threads of a service have which scheduling policy."""
    found: Counter[int] = Counter()
    for thread in system.service(service).threads():
        # One that gRPC has no more work for may end at any time.
        with contextlib.suppress(ProcessLookupError):
            found[os.sched_getscheduler(thread.id)] += 1
    return found


@pytest.mark.parametrize("service", SERVICES)
def test_whoever_serves_gives_way(llama_system: System, service: str) -> None:
    assert os.sched_getscheduler(llama_system.service(service).pid) == os.SCHED_BATCH


@pytest.mark.parametrize("service", sorted({*SERVICES} - {"executor"}))
def test_no_thread_of_a_service_that_computes_nothing_goes_first(
    llama_system: System, service: str
) -> None:
    assert set(policies(llama_system, service)) == {os.SCHED_BATCH}


def test_the_step_thread_and_those_of_its_kernels_go_first(
    start: Callable[..., System], llama_system: System
) -> None:
    """At least as many as compute: PyTorch may have some beside those of the kernels."""
    system = start(Path(llama_system.model), "--threads", "2", runner="native")
    num_computing = 2 if choose("auto").library is not None else 1
    assert policies(system, "executor")[os.SCHED_OTHER] >= num_computing
