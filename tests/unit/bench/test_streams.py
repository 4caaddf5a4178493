"""What is made of samples of memory and processor time."""

import pytest

from bench.streams.usage import (
    Sample,
    after_filling,
    cores,
    cpu_share,
    growth_mib,
    is_flat,
    take_sample,
)


def series(pss_mib, cores_busy=0.5, every_s=10.0):
    return [
        Sample(index * every_s, pss, index * every_s * cores_busy)
        for index, pss in enumerate(pss_mib)
    ]


def test_the_first_quarter_does_not_count():
    # It starts up in the first 100 seconds, and then works with half a core.
    grown = [Sample(at * 10.0, 100.0 + 10 * min(at, 10), 90.0 + at * 5.0) for at in range(40)]
    assert growth_mib(grown) == 0
    assert is_flat(grown)
    assert cores(grown) == pytest.approx(0.5)


def test_a_leak_is_seen_through_noise():
    leaking = series([100 + index * 0.5 + (-1) ** index * 3 for index in range(120)])
    steady = series([100 + (-1) ** index * 3 for index in range(120)])
    assert growth_mib(leaking) > 25
    assert is_flat(leaking) is False
    assert is_flat(steady) is True


def test_a_pool_that_is_used_for_the_first_time_is_no_leak():
    filling = [100 + min(index, 60) * 10 for index in range(120)]
    assert is_flat(series(filling)) is False
    assert is_flat(after_filling(series(filling), 600)) is True
    assert is_flat(after_filling(series(filling), 700)) is None, "it never was full"
    assert after_filling(series(filling), 0) == series(filling)
    leaking = [mib + 2 * index for index, mib in enumerate(filling)]
    assert is_flat(after_filling(series(leaking), 600)) is False


def test_a_short_run_says_nothing_of_memory():
    assert is_flat(series([100.0] * 10)) is None


def test_shares_are_of_the_same_time():
    times = {"gateway": series([1] * 40, 0.1), "scheduler": series([1] * 40, 0.05)}
    times["executor"] = series([1] * 40, 1.5)
    assert cpu_share(times, ("gateway", "scheduler"), "executor") == pytest.approx(0.1)


def test_a_sample_is_of_a_real_process():
    psutil = pytest.importorskip("psutil")
    sample = take_sample(psutil.Process(), 3.0)
    assert sample.at_s == 3.0
    assert sample.pss_mib > 1
    assert sample.cpu_s > 0
