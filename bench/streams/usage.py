"""Memory and processor time of the processes of a system, taken now and then."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 1 << 20
# A trend below this is noise: allocators keep and give back megabytes as they like.
_GROWTH_MIB_MAX = 8.0
_GROWTH_PART_MAX = 0.05
_WATCH_S_MIN = 240.0
_FILLED_PART = 0.97


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment.

    Attributes:
        at_s: Seconds since the load began.
        pss_mib: Memory, shared pages counted in parts (proportional set size), MiB.
        cpu_s: Processor time that it has taken in all, seconds.
    """

    at_s: float
    pss_mib: float
    cpu_s: float


def take_sample(process: psutil.Process, at_s: float) -> Sample:
    """What a process takes now."""
    times = process.cpu_times()
    return Sample(at_s, _pss_mib(process.pid), times.user + times.system)


def cpu_share(series: Mapping[str, Sequence[Sample]], services: Sequence[str], of: str) -> float:
    """Processor time of ``services`` by that of ``of``, while all streams were open."""
    used_s = sum(_cpu_s(series[name]) for name in services)
    return used_s / max(1e-9, _cpu_s(series[of]))


def cores(series: Sequence[Sample]) -> float:
    """Processors that a process kept busy, on average."""
    settled = _settled(series)
    return _cpu_s(series) / max(1e-9, settled[-1].at_s - settled[0].at_s)


def growth_mib(series: Sequence[Sample]) -> float:
    """By how much memory grew, from the first to the last third of the settled time, in medians."""
    settled = [sample.pss_mib for sample in _settled(series)]
    third = max(1, len(settled) // 3)
    return statistics.median(settled[-third:]) - statistics.median(settled[:third])


def after_filling(series: Sequence[Sample], pool_mib: float) -> Sequence[Sample]:
    """What follows once a pool of blocks is filled; nothing if it never is.

    The system gives a block its memory when it is first written, and what is freed stays cached
    there: until each block was used once, a pool grows as it should.
    """
    full_mib = series[0].pss_mib + _FILLED_PART * pool_mib
    begins = (index for index, sample in enumerate(series) if sample.pss_mib >= full_mib)
    return series[next(begins, len(series)) :]


def is_flat(series: Sequence[Sample]) -> bool | None:
    """Whether memory did not grow but for what is noise; None if it was not watched for long.

    Buffers, caches and indices fill up in the first minutes, as they should.
    """
    if not series or series[-1].at_s - series[0].at_s < _WATCH_S_MIN:
        return None
    settled = [sample.pss_mib for sample in _settled(series)]
    allowed = max(_GROWTH_MIB_MAX, _GROWTH_PART_MAX * statistics.median(settled))
    return growth_mib(series) <= allowed


def _settled(series: Sequence[Sample]) -> Sequence[Sample]:
    """Behind the first quarter: by then all streams are open and every buffer has its size."""
    return series[len(series) // 4 :]


def _cpu_s(series: Sequence[Sample]) -> float:
    settled = _settled(series)
    return settled[-1].cpu_s - settled[0].cpu_s


def _pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"the kernel tells no proportional set size of process {pid}")
