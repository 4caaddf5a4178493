"""How near the CPU's linear layers come to what the machine can do, beside PyTorch's.

    python -m bench.cpu_linear [--rows 1,16] [--dtype bf16] [--isa avx2] [--output FILE]

The layers are those of SmolLM2-135M. Each contender has enough copies of the weights that they come
from memory, as they do in a step, and all take turns: a figure is the best of many calls, because
other processes only ever make one slower. Peak arithmetic and memory bandwidth are measured in the
same turns, for one thread; so is everything else unless ``--threads`` says so. With one thread its
own time is taken, which does not run while another process has the core.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.cpu_limits import Limits
from pageframe.kernels.cpu.library import CpuLibrary, Pool, load
from pageframe.kernels.cpu.linear import PackedLinear

LAYERS = {
    "qkv": (576, 960),
    "output": (576, 576),
    "gate+up": (576, 3072),
    "down": (1536, 576),
    "head": (576, 49152),
}
ROWS = (1, 4, 16, 64, 256, 2048)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Three times the last-level cache of common machines.
NUM_BYTES_OF_COPIES = 96 << 20
NUM_COPIES_MAX = 64
# A turn is long enough for the clock and short enough to fall between two other processes' turns.
SECONDS_PER_TURN = 0.002

Turn = Callable[[int], object]
"""Runs the layer with copy number n of the weights."""


def ours(
    library: CpuLibrary, pool: Pool, weights: list[torch.Tensor], x: torch.Tensor
) -> Iterator[tuple[str, Turn]]:
    """Packed weights, our kernels."""
    num_out, num_in = weights[0].shape
    layers = [
        PackedLinear(library, num_in, num_out, dtype=weights[0].dtype) for _ in range(len(weights))
    ]
    for layer, weight in zip(layers, weights, strict=True):
        layer.pack(weight)
    rows = x.to(layers[0].row_dtype)
    y = torch.empty(len(x), num_out)
    yield "ours", lambda copy: layers[copy](pool, rows, y)


def torchs(weights: list[torch.Tensor], x: torch.Tensor) -> Iterator[tuple[str, Turn]]:
    """Plain weights; and those that oneDNN has packed, where this build of PyTorch has it."""
    yield "torch", lambda copy: torch.nn.functional.linear(x, weights[copy])
    operations = torch.ops.mkldnn
    try:
        packed = [operations._reorder_linear_weight(weight, len(x)) for weight in weights]
    except (AttributeError, RuntimeError):
        return
    yield (
        "oneDNN packed",
        lambda copy: operations._linear_pointwise(x, packed[copy], None, "none", [], ""),
    )


def best_seconds(
    clock: Callable[[], float],
    turns: dict[str, Turn],
    num_copies: int,
    limits: Limits,
    seconds: float,
) -> dict[str, float]:
    """Least time of one call of each, all taking turns for so many seconds in all."""
    best = dict.fromkeys(turns, float("inf"))
    copy = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        limits.measure()
        for name, turn in turns.items():
            turn_end = time.perf_counter() + SECONDS_PER_TURN
            while time.perf_counter() < turn_end:
                copy = (copy + 1) % num_copies
                start = clock()
                turn(copy)
                best[name] = min(best[name], clock() - start)
    return best


def measure(
    library: CpuLibrary, pool: Pool, limits: Limits, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One record for each dtype, layer and number of rows."""
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    for dtype_name in options.dtype.split(","):
        for layer_name in options.layer.split(","):
            num_in, num_out = LAYERS[layer_name]
            dtype = DTYPES[dtype_name]
            num_bytes = num_in * num_out * dtype.itemsize
            num_copies = max(2, min(NUM_COPIES_MAX, -(-NUM_BYTES_OF_COPIES // num_bytes)))
            weights = [torch.randn(num_out, num_in).to(dtype) for _ in range(num_copies)]
            for num_rows in map(int, options.rows.split(",")):
                x = torch.randn(num_rows, num_in).to(dtype)
                turns = dict([*ours(library, pool, weights, x), *torchs(weights, x)])
                best = best_seconds(clock, turns, num_copies, limits, options.seconds)
                yield {
                    "dtype": dtype_name,
                    "layer": layer_name,
                    "num_in": num_in,
                    "num_out": num_out,
                    "num_rows": num_rows,
                    "us": {name: round(s * 1e6, 1) for name, s in best.items()},
                    "gflops": {
                        name: round(2 * num_rows * num_in * num_out / s / 1e9, 1)
                        for name, s in best.items()
                    },
                    "weights_gb_per_s": {
                        name: round(num_bytes / s / 1e9, 1) for name, s in best.items()
                    },
                }


def show(records: list[dict[str, Any]], limits: Limits, console: Console) -> None:
    """Print a table."""
    title = f"peak {limits.gflops:.0f} GFLOP/s, memory {limits.gbytes:.1f} GB/s, one thread"
    table = Table("layer", "rows", "contender", "us", "GFLOP/s", "GB/s of weights", title=title)
    for record in records:
        for name, us in record["us"].items():
            table.add_row(
                f"{record['layer']} {record['dtype']}",
                str(record["num_rows"]),
                name,
                str(us),
                str(record["gflops"][name]),
                str(record["weights_gb_per_s"][name]),
            )
    console.print(table)


def main() -> int:
    """Measure and print; write JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--layer", default=",".join(LAYERS))
    parser.add_argument("--dtype", default=",".join(DTYPES))
    parser.add_argument("--isa", help="instruction set; the best unless given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line of the table")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library = load(options.isa)
    pool = library.create_pool(options.threads)
    limits = Limits(library)
    records = list(measure(library, pool, limits, options))
    show(records, limits, Console(file=sys.stderr))
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "num_cpus": os.cpu_count()},
        "isa": library.isa,
        "num_threads": options.threads,
        "torch": torch.__version__,
        "peak_gflops": round(limits.gflops, 1),
        "read_gb_per_s": round(limits.gbytes, 1),
        "layers": records,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
