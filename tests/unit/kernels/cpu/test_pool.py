"""Threads that walk through phases: nothing lost, nothing early, whoever is slow."""

import ctypes
import os
import threading

import pytest

from pageframe.core.errors import InvalidRequestError
from pageframe.kernels.cpu.library import CpuLibrary, Pool
from unit.kernels.cpu.libraries import loaded


@pytest.fixture(scope="module")
def library() -> CpuLibrary:
    return loaded("baseline")


def exercise(library: CpuLibrary, pool: Pool, num_phases: int, num_tasks: int) -> list[int]:
    """Tasks done by each thread; each task has checked the phase before it."""
    done = (ctypes.c_int64 * pool.num_threads)()
    num_wrong = library.functions.pf_pool_exercise(pool.handle, num_phases, num_tasks, done)
    assert num_wrong == 0
    assert sum(done) == num_phases * num_tasks
    return list(done)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_tasks", [0, 1, 2, 7, 100])
def test_each_phase_sees_all_of_the_one_before(library, num_threads, num_tasks):
    pool = library.create_pool(num_threads)
    assert pool.num_threads == num_threads
    for num_phases in (0, 1, 2, 501):
        exercise(library, pool, num_phases, num_tasks)


def test_eight_threads_pass_a_hundred_thousand_barriers_on_whatever_cores(library):
    exercise(library, library.create_pool(8), 100_000, 9)


def test_every_thread_gets_work_sooner_or_later(library):
    pool = library.create_pool(3)
    idle = {0, 1, 2}
    while idle:
        done = exercise(library, pool, 1000, 8)
        idle -= {index for index, count in enumerate(done) if count}


def test_runs_of_several_callers_take_turns(library):
    pool = library.create_pool(3)
    callers = [
        threading.Thread(target=lambda: [exercise(library, pool, 200, 5) for _ in range(20)])
        for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()


def test_pools_come_and_go(library):
    for _ in range(50):
        pool = library.create_pool(4)
        exercise(library, pool, 3, 5)
        pool.close()


def test_a_forked_child_computes_alone_and_ends(library):
    pool = library.create_pool(3)
    exercise(library, pool, 100, 5)
    child = os.fork()
    if child == 0:
        try:
            done = exercise(library, pool, 100, 5)
            pool.close()
            os._exit(0 if done == [500, 0, 0] else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    exercise(library, pool, 100, 5)


def test_no_thread_is_no_pool(library):
    with pytest.raises(InvalidRequestError, match="NUM_THREADS"):
        library.create_pool(0)
