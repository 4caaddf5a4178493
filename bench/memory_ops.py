"""What the bookkeeping of KV memory costs per block, in a small pool and in a large one.

    python -m bench.memory_ops [--operation TEXT] [--rounds N] [--output FILE]

Every operation runs on 500 blocks of a pool of 1,000 and of one of 100,000 blocks, in turns. The
figures are medians of nanoseconds per block; the ratio of the two is taken within each round. An
operation that walks over the pool shows a ratio of a hundred. A ratio of two or three is the
processor's: what is touched of a large pool is in no cache.

The garbage collector is off during a turn, as in ``timeit``. The first rounds are dropped.
"""

import argparse
import gc
import json
import os
import platform
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.memory import eviction, lookup, pool
from bench.memory.operations import (
    BLOCK_SIZE,
    NUM_BLOCKS_PER_TURN,
    OPERATIONS,
    Operation,
    Watch,
)

# Each enters its operations into the table when it is imported.
MODULES = (pool, lookup, eviction)

NUM_BLOCKS = (1_000, 100_000)
NUM_ROUNDS_DROPPED = 3


def measure(make: Operation, num_rounds: int, rng: random.Random) -> dict[str, Any]:
    """Nanoseconds per block for both sizes of pool, and the ratio of large to small."""
    turns = {num_blocks: make(num_blocks, rng) for num_blocks in NUM_BLOCKS}
    figures: dict[int, list[float]] = {num_blocks: [] for num_blocks in NUM_BLOCKS}
    gc.collect()
    gc.disable()
    try:
        for index in range(NUM_ROUNDS_DROPPED + num_rounds):
            for num_blocks in rng.sample(NUM_BLOCKS, len(NUM_BLOCKS)):
                watch = Watch()
                num_done = turns[num_blocks](watch)
                if index >= NUM_ROUNDS_DROPPED:
                    figures[num_blocks].append(watch.elapsed_ns / num_done)
    finally:
        gc.enable()
    small, large = (figures[num_blocks] for num_blocks in NUM_BLOCKS)
    return {
        "ns_per_block": {str(size): spread(values) for size, values in figures.items()},
        "large_to_small": spread([b / a for a, b in zip(small, large, strict=True)]),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def main() -> int:
    """Measure all operations and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--operation", default="", help="only those whose name contains this")
    parser.add_argument("--rounds", type=int, default=41, help="turns of each that are counted")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    arguments = parser.parse_args()
    chosen = {name: make for name, make in OPERATIONS.items() if arguments.operation in name}
    if not chosen:
        parser.error(f"no operation contains {arguments.operation!r}; known: {list(OPERATIONS)}")
    if arguments.rounds < 2:
        parser.error("a median with its spread needs two rounds at least")
    rng = random.Random(0)
    bar = track(chosen.items(), "operations", console=Console(stderr=True))
    results = {name: measure(make, arguments.rounds, rng) for name, make in bar}
    report = {
        "machine": platform.machine(),
        "num_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "block_size": BLOCK_SIZE,
        "num_blocks_per_turn": NUM_BLOCKS_PER_TURN,
        "num_rounds": arguments.rounds,
        "num_rounds_dropped": NUM_ROUNDS_DROPPED,
        "operations": results,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _print(results)
    return 0


def _print(results: dict[str, Any]) -> None:
    sizes = (f"ns of {num_blocks:,}" for num_blocks in NUM_BLOCKS)
    table = Table("per block", *sizes, "ratio", "quartiles")
    for name, figures in results.items():
        medians = (f"{figures['ns_per_block'][str(size)]['median']:,.0f}" for size in NUM_BLOCKS)
        ratio = figures["large_to_small"]
        quartiles = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        table.add_row(name, *medians, f"{ratio['median']:.2f}", quartiles)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
