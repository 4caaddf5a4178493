"""What it costs a step that the last operations on blocks are kept for watchers.

    python -m bench.operation_log [--rounds N] [--output FILE]

Processor time of the recording thread, per operation, beyond what the sink behind the log costs by
itself; the best of all rounds, since whatever else the machine does only adds to it. `flush` is
called once for each step; `watched` has a watcher, `read` and `encode` are what that costs the
event loop per operation.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from pageframe.core.clock import SystemClock
from pageframe.core.trace import KvCause, KvOperation, NullTraceSink, TraceSink
from pageframe.executor.operation_log import OperationLog
from pageframe.wire.kv_memory import batch_to_proto

NUM_OPERATIONS = 100_000
NUM_OPERATIONS_PER_STEP = 50
NUM_READ = 4096


def record(sink: TraceSink, block_ids: list[int], flush: Callable[[], None] | None = None) -> float:
    """Nanoseconds per operation."""
    kv = sink.kv
    start_ns = time.process_time_ns()
    for number in range(NUM_OPERATIONS):
        kv(
            KvOperation.ALLOCATE,
            KvCause.DECODE,
            sequence_id=number,
            generation=0,
            position=number,
            step=1,
            block_ids=block_ids,
            num_free_after=9,
        )
        if flush is not None and not number % NUM_OPERATIONS_PER_STEP:
            flush()
    return (time.process_time_ns() - start_ns) / NUM_OPERATIONS


def new_log() -> OperationLog:
    return OperationLog(NullTraceSink(), SystemClock())


def measure_round() -> dict[str, float]:
    """One figure for each case, nanoseconds per operation."""
    figures = {}
    for num_blocks in (1, 4, 16):
        block_ids = list(range(1000, 1000 + num_blocks))
        figures[f"sink, {num_blocks} blocks"] = record(NullTraceSink(), block_ids)
        log = new_log()
        figures[f"log, {num_blocks} blocks"] = record(log, block_ids)
    log = new_log()
    figures["log, flushed"] = record(log, [1000], log.flush)
    log = new_log()
    log.on_operations = lambda: None
    figures["log, watched"] = record(log, [1000], log.flush)
    start_ns = time.process_time_ns()
    batch = log.read(log.num_operations - NUM_READ + 1)
    read_ns = time.process_time_ns()
    batch_to_proto(batch)
    figures["read"] = (read_ns - start_ns) / NUM_READ
    figures["encode"] = (time.process_time_ns() - read_ns) / NUM_READ
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    console = Console(file=sys.stderr)
    rounds = [measure_round() for _ in track(range(arguments.rounds), "rounds", console=console)]
    best = {name: min(figures[name] for figures in rounds) for name in rounds[0]}
    table = Table("", "ns per operation", "beyond the sink")
    for name, figure in best.items():
        sink_ns = best.get(name.replace("log", "sink"), best["sink, 1 blocks"])
        extra = f"{figure - sink_ns:.0f}" if name.startswith("log") else ""
        table.add_row(name, f"{figure:.0f}", extra)
    console.print(table)
    result = {"python": platform.python_version(), "machine": platform.machine(), "ns": best}
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
