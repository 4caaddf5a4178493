"""Threads of a pool that find themselves on one core, and where they are then."""

import ctypes
import os
from pathlib import Path

import pytest

from pageframe.kernels.cpu.build import SOURCE_DIR
from pageframe.kernels.cpu.compiler import compile_library, find_compiler

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="the system does not tell where threads are"
)
_NUM_TURNS = 50


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    target = tmp_path_factory.mktemp("probe") / "seats.so"
    sources = [Path(__file__).parent / "seats_probe.cpp", SOURCE_DIR / "seats.cpp"]
    compile_library(find_compiler(), sources, [f"-I{SOURCE_DIR}"], target)
    return ctypes.CDLL(str(target))


@pytest.fixture
def allowed():
    """The cores of this thread, which are the same afterwards."""
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def where(function) -> tuple[int, int]:
    """The core that two shared, and that of the second afterwards."""
    shared = ctypes.c_int(-1)
    core = function(ctypes.byref(shared))
    return shared.value, core


def test_the_second_of_two_on_a_core_goes_to_another(probe, allowed):
    if len(allowed) < 2:
        pytest.skip("there is one core")
    for _ in range(_NUM_TURNS):
        shared, core = where(probe.second_of_two_on_a_core)
        assert core in allowed - {shared}
        assert os.sched_getaffinity(0) == allowed


def test_where_there_is_one_core_both_stay(probe, allowed):
    only = {min(allowed)}
    os.sched_setaffinity(0, only)
    assert {*where(probe.second_of_two_on_a_core)} == only
    assert os.sched_getaffinity(0) == only


def test_one_that_sleeps_is_in_nobodys_way(probe, allowed):
    only = {max(allowed)}
    # Were it moved, it would be somewhere else when it may be anywhere again.
    os.sched_setaffinity(0, only)
    os.sched_setaffinity(0, allowed)
    stays = [
        shared == core
        for shared, core in (where(probe.second_beside_one_asleep) for _ in range(_NUM_TURNS))
    ]
    assert stays.count(True) > _NUM_TURNS // 2
