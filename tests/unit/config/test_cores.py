"""Threads that serve give way to those that compute."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from pageframe.config import cores

T = TypeVar("T")


def in_a_thread(function: Callable[[], T]) -> T:
    """What it returns where nothing that it does to its thread outlives it."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()


def policy() -> int:
    return os.sched_getscheduler(0)


def test_a_thread_that_gives_way_passes_that_on_to_those_it_starts() -> None:
    def serve() -> list[int]:
        cores.give_way()
        return [in_a_thread(policy), policy()]

    assert in_a_thread(serve) == [os.SCHED_BATCH, os.SCHED_BATCH]
    assert policy() == os.SCHED_OTHER, "the threads beside it are as they were"


def test_one_that_goes_first_again_is_alone_in_that() -> None:
    def compute() -> list[int]:
        cores.go_first()
        return [in_a_thread(policy), policy()]

    def serve() -> list[int]:
        cores.give_way()
        return [*in_a_thread(compute), policy()]

    assert in_a_thread(serve) == [os.SCHED_OTHER, os.SCHED_OTHER, os.SCHED_BATCH]


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
