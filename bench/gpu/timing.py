"""How long a kernel takes: replays of a CUDA graph, cold second-level cache, medians.

    graph    [ launch on memory 0 ][ launch on memory 1 ] ... [ launch on memory n - 1 ]
    replays  |────────────────── time ──────────────────|  many times; the median, divided by n

The launches of a graph work on different memory that together exceeds the cache, so each finds it
cold, as in a model whose layers take turns. Without a device (a dry run) each launch is interpreted
once, to see that it runs; its time means nothing.
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

Launch = Callable[[], object]
_NUM_WARMUPS = 3
_NUM_REPLAYS = 21


@dataclass(frozen=True)
class Time:
    """Seconds per launch."""

    median: float
    best: float


def time_launches(launches: Sequence[Launch], device: torch.device) -> Time:
    """Time of one launch, over all of them."""
    if device.type == "cpu":
        start = time.perf_counter()
        launches[0]()
        elapsed = time.perf_counter() - start
        return Time(elapsed, elapsed)
    # Compilation and scratch memory come before the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_NUM_WARMUPS):
            for launch in launches:
                launch()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return _time_replays(graph.replay, len(launches))


def time_eager(launches: Sequence[Launch], device: torch.device) -> Time:
    """As ``time_launches`` for what a graph cannot hold, such as copies from and to host memory."""
    if device.type == "cpu":
        return time_launches(launches, device)

    def run_all() -> None:
        for launch in launches:
            launch()

    return _time_replays(run_all, len(launches))


def _time_replays(replay: Launch, num_launches: int) -> Time:
    for _ in range(_NUM_WARMUPS):
        replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_NUM_REPLAYS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize()
    milliseconds = [before.elapsed_time(after) for before, after in pairwise(marks)]
    return Time(
        statistics.median(milliseconds) / 1e3 / num_launches,
        min(milliseconds) / 1e3 / num_launches,
    )


def machine_facts(device: torch.device) -> dict[str, object]:
    """Names, versions and clocks, for the record."""
    import triton

    facts: dict[str, object] = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": "none: a dry run, interpreted on the CPU",
    }
    if device.type == "cpu":
        return facts
    properties = torch.cuda.get_device_properties(device)
    facts["device"] = properties.name
    facts["num_processors"] = properties.multi_processor_count
    facts["capability"] = f"{properties.major}.{properties.minor}"
    facts["cuda"] = torch.version.cuda
    facts["clocks"] = clocks()
    return facts


def clocks() -> str:
    """What ``nvidia-smi`` says now: SM clock, memory clock, power, temperature, driver."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return done.stdout.strip().splitlines()[0]
