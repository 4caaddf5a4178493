"""Threads that serve give way to those that compute."""

import os
import threading
from collections.abc import Callable

import pytest

from pageframe.config import cores


def in_a_thread(function: Callable[[], object]) -> None:
    """Run it where nothing that it does to its thread outlives it; raises what it raises."""
    failed = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def policy() -> int:
    return os.sched_getscheduler(0)


def test_a_thread_that_gives_way_passes_that_on_to_those_it_starts() -> None:
    seen = []

    def serve() -> None:
        cores.give_way()
        in_a_thread(lambda: seen.append(policy()))
        seen.append(policy())

    in_a_thread(serve)
    assert seen == [os.SCHED_BATCH, os.SCHED_BATCH]
    assert policy() == os.SCHED_OTHER, "the threads beside it are as they were"


def test_one_that_goes_first_again_is_alone_in_that() -> None:
    seen = []

    def compute() -> None:
        cores.go_first()
        in_a_thread(lambda: seen.append(policy()))
        seen.append(policy())

    def serve() -> None:
        cores.give_way()
        in_a_thread(compute)
        seen.append(policy())

    in_a_thread(serve)
    assert seen == [os.SCHED_OTHER, os.SCHED_OTHER, os.SCHED_BATCH]


@pytest.mark.parametrize("change", [cores.give_way, cores.go_first])
def test_a_policy_that_somebody_chose_stays(change: Callable[[], None]) -> None:
    def run() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        change()
        assert policy() == os.SCHED_IDLE

    in_a_thread(run)


def test_a_niceness_stays() -> None:
    def run() -> None:
        tid = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, tid, 7)
        cores.give_way()
        assert os.getpriority(os.PRIO_PROCESS, tid) == 7

    in_a_thread(run)


def test_a_system_that_refuses_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    in_a_thread(cores.give_way)


def test_a_system_without_such_a_policy_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "SCHED_BATCH")
    monkeypatch.delattr(os, "sched_getscheduler")
    in_a_thread(cores.give_way)
    in_a_thread(cores.go_first)
