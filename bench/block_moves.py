"""What it costs to move whole blocks in main memory, and how else it could be done.

    python -m bench.block_moves [--output FILE]

For each size of block and number of blocks, the ways take turns, and medians are reported:

    rows     the product's: one tensor copy per row
    views    one copy per row through memoryviews
    index    ``index_copy_`` of an ``index_select``, on bytes
    words    the same on the bytes seen as int64
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pageframe.executor.model.block_rows import copy_rows
from pageframe.executor.model.reserved_range import ReservedRange

# The default model's block of 16 tokens in bfloat16 is 368,640 bytes, in float32 twice that.
BLOCK_BYTES = (4096, 46_080, 368_640, 737_280)
NUM_MOVED = (1, 4, 16, 64, 256)
NUM_ROUNDS = 15
_ARENA_BYTES = 512 << 20

Ids = NDArray[np.int64]


def make_arena(num_blocks: int, block_bytes: int) -> torch.Tensor:
    """uint8 [num_blocks, block_bytes], every page of it in memory."""
    reserved = ReservedRange(num_blocks * block_bytes)
    flat = torch.frombuffer(reserved.buffer, dtype=torch.uint8)
    return flat.fill_(1).view(num_blocks, block_bytes)


def _rows(source: torch.Tensor, sources: Ids, target: torch.Tensor, targets: Ids) -> None:
    copy_rows(source, sources, target, targets)


def _views(source: torch.Tensor, sources: Ids, target: torch.Tensor, targets: Ids) -> None:
    size = source.shape[1]
    taken, put = (memoryview(tensor.view(-1).numpy()) for tensor in (source, target))
    for source_row, target_row in zip(sources.tolist(), targets.tolist(), strict=True):
        put[target_row * size :][:size] = taken[source_row * size :][:size]


def _index(source: torch.Tensor, sources: Ids, target: torch.Tensor, targets: Ids) -> None:
    moved = source.index_select(0, torch.from_numpy(sources))
    target.index_copy_(0, torch.from_numpy(targets), moved)


def _words(source: torch.Tensor, sources: Ids, target: torch.Tensor, targets: Ids) -> None:
    _index(source.view(torch.int64), sources, target.view(torch.int64), targets)


WAYS = {"rows": _rows, "views": _views, "index": _index, "words": _words}


def measure(
    source: torch.Tensor, target: torch.Tensor, num_moved: int, rng: np.random.Generator
) -> dict[str, float]:
    """Median seconds of each way to move ``num_moved`` rows, one of each per round.

    Each run has rows of its own, and the order changes, so that none finds in a cache what the
    one before it has brought there.
    """
    num_blocks = source.shape[0]
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for index in range(NUM_ROUNDS + 1):
        for name in rng.permutation(list(WAYS)):
            sources, targets = (rng.permutation(num_blocks)[:num_moved] for _ in range(2))
            start = time.perf_counter()
            WAYS[name](source, sources, target, targets)
            # The first round warms up.
            if index:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> int:
    """Measure all sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    results = []
    cases = [(size, count) for size in BLOCK_BYTES for count in NUM_MOVED]
    console = Console(stderr=True)
    for block_bytes, num_moved in track(cases, "moving blocks", console=console):
        num_blocks = min(_ARENA_BYTES // block_bytes, 4096)
        source, target = (make_arena(num_blocks, block_bytes) for _ in range(2))
        seconds = measure(source, target, num_moved, rng)
        results.append(
            {
                "block_bytes": block_bytes,
                "num_blocks": num_moved,
                "gib_per_s": {
                    name: num_moved * block_bytes / value / 2**30 for name, value in seconds.items()
                },
                "us_per_block": {name: value * 1e6 / num_moved for name, value in seconds.items()},
            }
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _print(results)
    return 0


def _print(results: list[dict]) -> None:
    table = Table("block bytes", "blocks", *(f"{name} GiB/s" for name in results[0]["gib_per_s"]))
    for entry in results:
        speeds = (f"{speed:.1f}" for speed in entry["gib_per_s"].values())
        table.add_row(f"{entry['block_bytes']:,}", str(entry["num_blocks"]), *speeds)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
