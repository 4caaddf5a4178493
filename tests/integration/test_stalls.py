"""Over real processes: the account of every request adds up to the time that it took."""

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from integration.system import System
from pageframe.client import GenerationRequest
from pageframe.telemetry.stall_report import stall_report

NUM_REQUESTS = 24


def test_nothing_of_a_crowd_s_time_is_left_unexplained(
    start: Callable[..., System], sim_model: Path
):
    system = start(
        sim_model,
        *("--sim-step", "2ms", "--trace", "audit", "--token-budget", "64"),
        *("--num-blocks", "24", "--block-size", "16", "--max-num-sequences", "8"),
    )
    requests = [
        GenerationRequest(
            token_ids=[5 + index] * (20 + 7 * (index % 4)),
            max_tokens=40 + index,
            num_samples=1 + index % 2,
            request_id=f"r{index}",
        )
        for index in range(NUM_REQUESTS)
    ]
    with ThreadPoolExecutor(NUM_REQUESTS) as threads:
        list(threads.map(system.complete, requests))
    system.settle()
    system.stop(signal.SIGTERM)
    report = stall_report(system.spans())
    assert len(report.requests) == NUM_REQUESTS
    causes = report.by_cause()
    assert {"queue", "preempted", "transport"} <= set(causes), list(causes)
    for entry in report.requests:
        unexplained_ms = entry.stall_ms.get("unexplained", 0.0)
        assert unexplained_ms <= max(1.0, 0.02 * entry.elapsed_ms), entry
        assert abs(entry.compute_ms + entry.waited_ms - entry.elapsed_ms) < 0.01, entry
    assert report.culprits, "somebody waited for somebody"
