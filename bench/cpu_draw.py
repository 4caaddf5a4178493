"""How long drawing tokens takes on the CPU, compiled beside PyTorch.

    python -m bench.cpu_draw [--rows 1,64] [--shape peaked] [--isa avx2] [--output FILE]

Both draw from the same logits and take turns: a figure is the best of many calls, because other
processes only ever make one slower. With one thread its own time is taken, which does not run while
another process has the core. ``peaked`` logits are shaped like those of a language model, a few
tokens far ahead of a long tail; ``flat`` ones are noise, of which top-p keeps two thirds.

A draw needs the best token of its row. NumPy finds that beside the kernels, which find it as they
draw, too (``both``).
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pageframe.executor.model.draw import Draws, draw
from pageframe.executor.model.selection import best_token
from pageframe.kernels.cpu.draw import CpuDraw, DrawColumns
from pageframe.kernels.cpu.library import load

VOCAB_SIZE = 49_152
ROWS = (1, 16, 64)
SHAPES = ("peaked", "flat")
TEMPERATURE = 0.8
FILTERS: dict[str, dict[str, float]] = {
    "temperature": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50": {"top_k": 50},
    "min_p 0.1": {"min_p": 0.1},
}
NUM_CALLS_MIN = 3

Turn = Callable[[], object]
"""Draws once."""


def make_logits(shape: str, num_rows: int, vocab_size: int) -> torch.Tensor:
    """Logits float32 [num_rows, vocab_size]."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(num_rows, vocab_size, generator=generator)
    if shape == "flat":
        return noise
    tail = torch.empty(num_rows, vocab_size).exponential_(1 / 1.2, generator=generator)
    logits = 2.5 * noise + tail
    ahead = torch.randint(vocab_size, (num_rows, 20), generator=generator)
    return logits.scatter_add_(1, ahead, torch.full(ahead.shape, 8.0))


def make_draws(logits: torch.Tensor, filters: dict[str, float], kernels: CpuDraw | None) -> Draws:
    """One draw from each row."""
    num_rows, vocab_size = logits.shape
    return Draws(
        logits=logits,
        maxima=logits.amax(1),
        index=np.arange(num_rows),
        temperature=np.full(num_rows, TEMPERATURE, np.float32),
        top_k=np.full(num_rows, int(filters.get("top_k", vocab_size))),
        top_p=np.full(num_rows, filters.get("top_p", 1.0)),
        min_p=np.full(num_rows, filters.get("min_p", 0.0), np.float32),
        uniforms=np.random.default_rng(0).random(num_rows),
        kernels=kernels,
    )


def make_choice(draws: Draws, kernels: CpuDraw) -> Turn:
    """The same draws with the search for the best token, and random numbers of their own."""
    count = len(draws)
    columns = DrawColumns(
        seeds=np.arange(count, dtype=np.uint64),
        sample_indices=np.zeros(count, np.uint32),
        temperature=draws.temperature,
        top_k=draws.top_k,
        top_p=draws.top_p,
        min_p=draws.min_p,
    )
    rows = np.arange(count, dtype=np.int32)
    return partial(kernels.choose, draws.logits, rows, rows, np.ones(count, np.bool_), columns)


def best_seconds(
    clock: Callable[[], float], turns: dict[str, Turn], seconds: float
) -> dict[str, float]:
    """Least time of one call of each, all taking turns for so many seconds in all."""
    best = dict.fromkeys(turns, float("inf"))
    end = time.perf_counter() + seconds
    num_calls = 0
    while num_calls < NUM_CALLS_MIN or time.perf_counter() < end:
        for name, turn in turns.items():
            start = clock()
            turn()
            best[name] = min(best[name], clock() - start)
        num_calls += 1
    return best


def measure(kernels: CpuDraw, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each shape, number of rows and filter."""
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    for shape in options.shape.split(","):
        for num_rows in map(int, options.rows.split(",")):
            logits = make_logits(shape, num_rows, options.vocab_size)
            for name, filters in FILTERS.items():
                compiled = make_draws(logits, filters, kernels)
                plain = make_draws(logits, filters, None)
                turns: dict[str, Turn] = {
                    "ours": partial(draw, compiled),
                    "torch": partial(draw, plain),
                    "best token": partial(best_token, logits),
                    "our best token": partial(kernels.best, logits),
                    "both": make_choice(compiled, kernels),
                }
                best = best_seconds(clock, turns, options.seconds)
                yield {
                    "shape": shape,
                    "num_rows": num_rows,
                    "draw": name,
                    "ms": {turn: round(least * 1e3, 3) for turn, least in best.items()},
                    "ratio": round(best["torch"] / best["ours"], 1),
                    "num_same": int((draw(compiled) == draw(plain)).sum()),
                }


def show(records: list[dict[str, Any]], console: Console) -> None:
    """Print a table."""
    names = ("ours", "torch", "best token", "our best token", "both")
    table = Table("shape", "rows", "draw", *(f"{name}, ms" for name in names), "ratio", "same")
    for record in records:
        ms = record["ms"]
        table.add_row(
            record["shape"],
            str(record["num_rows"]),
            record["draw"],
            *(str(ms[name]) for name in names),
            str(record["ratio"]),
            str(record["num_same"]),
        )
    console.print(table)


def main() -> int:
    """Measure and print; write JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--shape", default=",".join(SHAPES))
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--isa", help="instruction set; the best unless given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line of the table")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    library = load(options.isa)
    kernels = CpuDraw(library, library.create_pool(options.threads))
    records = list(measure(kernels, options))
    show(records, Console(file=sys.stderr))
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "num_cpus": os.cpu_count()},
        "isa": library.isa,
        "num_threads": options.threads,
        "torch": torch.__version__,
        "vocab_size": options.vocab_size,
        "temperature": TEMPERATURE,
        "draws": records,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
