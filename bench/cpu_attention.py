"""Attention of decodes on a CPU: how fast keys and values are read, how time grows with context.

    python -m bench.cpu_attention [--threads 1] [--output FILE] [--library A.so --library B.so]

The heads and layers are those of SmolLM2-135M. A call walks through all layers of the pool, as a
step does, so that what is larger than the last cache comes from memory; its time is told for one
layer, with what a step does once, waking threads and planning, in it. Plain
reading of memory is measured in the same turns, with as many threads, and told of each shape's
turns and of all: on a shared machine it changes within seconds. So is ``reading``, which goes
through the same blocks in the same order and computes nothing: no kernel can be faster that reads
every sequence's blocks. With one thread its own time counts, which does not run while another
process has the core; a figure is the best of many turns, because others only ever make one slower.
Beside the best stands the median over the turns of what part of that turn's plain read was reached:
speeds of short turns have more luck than those of long ones, and a host that is fast for one second
must not be compared with the next. Several libraries take turns, and kinds of pages, which compares
versions of the kernels on a machine that is shared.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from bench.kv_pages import PAGES, KvLimits, pool_memory
from pageframe.kernels.cpu.attention import CpuParts
from pageframe.kernels.cpu.library import CpuLibrary, load
from pageframe.kernels.cpu.model import KV_DTYPES
from pageframe.kernels.cpu.model_abi import ArenaStruct
from pageframe.kernels.layouts import QUANTISED_DTYPES, KvLayout

_NUM_LAYERS, _NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 30, 9, 3, 64
_BLOCK_SIZE = 16
_SEED = 20241121
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
_READING = "reading"
# Large pools have fewer layers: they leave the last cache all the same.
_POOL_BYTES_MAX = 1 << 29
_GOAL_SHAPES = ((16, 256), (64, 256), (16, 2048), (64, 2048))
_GROWTH_CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)

Turn = Callable[[], float]
"""Goes through all layers of a pool; what comes back are the seconds that one took."""


class Decodes:
    """One layer's attention of sequences that decode, over a pool of all layers."""

    def __init__(
        self,
        num_sequences: int,
        context_len: int,
        dtype: torch.dtype,
        pages: str = PAGES[0],
        shared: tuple[int, int] = (1, 0),
    ) -> None:
        num_blocks = -(-context_len // _BLOCK_SIZE)
        slot_bytes = 2 * _NUM_KV_HEADS * _HEAD_DIM * dtype.itemsize
        layer_bytes = num_sequences * num_blocks * _BLOCK_SIZE * slot_bytes
        self.num_layers = max(1, min(_NUM_LAYERS, _POOL_BYTES_MAX // layer_bytes))
        layout = KvLayout(
            num_layers=self.num_layers,
            block_size=_BLOCK_SIZE,
            num_kv_heads=_NUM_KV_HEADS,
            head_dim=_HEAD_DIM,
            dtype=dtype,
            is_quantised=dtype in QUANTISED_DTYPES,
        )
        total = num_sequences * num_blocks
        # The same bytes everywhere are ordinary numbers in every type, and make no denormals.
        self._blocks = pool_memory(total * layout.block_bytes, pages).fill_(0x3C).view(total, -1)
        self._layer_bytes = layout.payload_bytes_per_block // self.num_layers
        self._payload_bytes: int = total * self._layer_bytes
        self._arena = ArenaStruct(
            blocks=self._blocks.data_ptr(),
            block_bytes=layout.block_bytes,
            payload_bytes=layout.payload_bytes_per_block,
            block_size=_BLOCK_SIZE,
            num_kv_heads=_NUM_KV_HEADS,
            head_dim=_HEAD_DIM,
            dtype=KV_DTYPES[dtype],
        )
        rng = np.random.default_rng(_SEED)
        self._tables = rng.permutation(total).astype(np.int32).reshape(num_sequences, num_blocks)
        group_size, num_shared = shared
        num_common = num_shared // _BLOCK_SIZE
        leaders = np.arange(num_sequences) // group_size * group_size
        self._tables[:, :num_common] = self._tables[leaders, :num_common]
        self._starts = np.arange(num_sequences + 1, dtype=np.int32)
        self._contexts = np.full(num_sequences, context_len, np.int32)
        self._query = torch.randn(num_sequences, _NUM_HEADS, _HEAD_DIM)
        self.kv_bytes = num_sequences * context_len * layout.kv_bytes_per_token // self.num_layers

    def turn(self, library: CpuLibrary, num_threads: int) -> Turn:
        """Computes all layers of the pool, as a step does: planned once, by threads awake."""
        clock = time.thread_time if num_threads == 1 else time.perf_counter
        pool = library.create_pool(num_threads)
        parts = CpuParts(library, self._arena, 0)

        def attend() -> float:
            start = clock()
            parts.attend(
                pool,
                self._query,
                query_start=self._starts,
                context_lens=self._contexts,
                block_tables=self._tables,
                scale=_HEAD_DIM**-0.5,
                num_layers=self.num_layers,
            )
            return (clock() - start) / self.num_layers

        return attend

    def reading(self, limits: KvLimits) -> Turn:
        """Reads the payload of these sequences in all layers of the pool."""
        read = limits.reading(self._blocks, self._tables, self._layer_bytes)
        return lambda: (
            sum(read(layer).seconds for layer in range(self.num_layers)) / self.num_layers
        )

    def num_bytes(self, name: str) -> int:
        """What a turn goes through: mere reading leaves out scales, and ends with a block."""
        return self._payload_bytes if name.startswith(_READING) else self.kv_bytes


class Measured(NamedTuple):
    """What all had that took turns.

    Attributes:
        seconds: Least for a layer, by name.
        parts: Median over the turns of the speed over that of the turn's plain read, by name.
        plain_gb_per_s: Best plain read of these turns.
    """

    seconds: dict[str, float]
    parts: dict[str, float]
    plain_gb_per_s: float


def measure(
    libraries: dict[str, CpuLibrary],
    limits: KvLimits,
    pools: dict[str, Decodes],
    options: argparse.Namespace,
) -> Measured:
    """Attention by each library and reading, with each kind of pages, all taking turns."""
    turns: dict[str, Turn] = {}
    for pages, decodes in pools.items():
        suffix = "" if pages == next(iter(pools)) else f", {pages} pages"
        for name, library in libraries.items():
            turns[name + suffix] = decodes.turn(library, limits.num_threads)
        turns[_READING + suffix] = decodes.reading(limits)
    num_bytes = next(iter(pools.values())).num_bytes
    plain: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    parts: dict[str, list[float]] = {name: [] for name in turns}
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end:
        plain.append(limits.measure())
        for name, turn in turns.items():
            seconds[name].append(turn())
            parts[name].append(num_bytes(name) / seconds[name][-1] / 1e9 / plain[-1])
    return Measured(
        {name: min(found) for name, found in seconds.items()},
        {name: statistics.median(found) for name, found in parts.items()},
        max(plain),
    )


def records(
    libraries: dict[str, CpuLibrary],
    limits: KvLimits,
    shapes: list[tuple[int, int]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One record for each dtype and shape."""
    found = []
    for dtype in options.dtype.split(","):
        for num_sequences, context_len in shapes:
            pools = {
                pages: Decodes(
                    num_sequences, context_len, _DTYPES[dtype], pages, parse_shape(options.shared)
                )
                for pages in options.pages.split(",")
            }
            measured = measure(libraries, limits, pools, options)
            decodes = next(iter(pools.values()))
            record = {
                "dtype": dtype,
                "num_sequences": num_sequences,
                "context_len": context_len,
                "kv_bytes": decodes.kv_bytes,
                "plain_read_gb_per_s": round(measured.plain_gb_per_s, 1),
                "us": {name: round(s * 1e6, 1) for name, s in measured.seconds.items()},
                "gb_per_s": {
                    name: round(decodes.num_bytes(name) / s / 1e9, 2)
                    for name, s in measured.seconds.items()
                },
                "part_of_plain_read": {
                    name: round(part, 3) for name, part in measured.parts.items()
                },
            }
            found.append(record)
            print(
                f"{dtype} {num_sequences} x {context_len}",
                record["gb_per_s"],
                record["part_of_plain_read"],
                f"plain read meanwhile {measured.plain_gb_per_s:.1f}",
                file=sys.stderr,
            )
    return found


def parse_shape(text: str) -> tuple[int, int]:
    """``16x256`` as two numbers."""
    first, _, second = text.partition("x")
    return int(first), int(second)


def plot(growth: list[dict[str, Any]], name: str, path: Path) -> None:
    """Time of a call over the context, with the line through the origin and the last point."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for dtype in dict.fromkeys(record["dtype"] for record in growth):
        part = [record for record in growth if record["dtype"] == dtype]
        contexts = [record["context_len"] for record in part]
        times = [record["us"][name] for record in part]
        (line,) = axes.plot(contexts, times, "o", label=dtype)
        axes.plot([0, contexts[-1]], [0, times[-1]], ":", color=line.get_color())
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("one layer of 16 sequences, us")
    axes.legend()
    axes.set_title("Attention of decodes; dotted: in proportion to the context")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Measure and print; write JSON and a picture when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bf16,fp32")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape")
    parser.add_argument("--library", type=Path, action="append", help="compare these; repeatable")
    parser.add_argument("--pages", default=PAGES[0], help="large, small or both: large,small")
    parser.add_argument(
        "--shared", default="1x0", help="8x256: groups of 8 share their first 256 tokens"
    )
    parser.add_argument("--shapes", help="as 16x256,64x256; those of the goal unless given")
    parser.add_argument("--output", type=Path, help="write JSON there, and a .png beside it")
    options = parser.parse_args()
    # A thread of OpenMP that has scaled 64 queries spins on, and takes a core from the kernels.
    torch.set_num_threads(1)
    built = load(None)
    libraries = {"built": built}
    if options.library:
        libraries = {path.stem: CpuLibrary(built.isa, path.resolve()) for path in options.library}
    shapes = list(_GOAL_SHAPES)
    if options.shapes:
        shapes = [parse_shape(shape) for shape in options.shapes.split(",")]
    limits = KvLimits(built, options.threads)
    found = records(libraries, limits, shapes, options)
    print(f"plain read {limits.gbytes:.1f} GB/s, threads: {limits.num_threads}", file=sys.stderr)
    if options.output:
        growth = records(
            libraries, limits, [(16, context) for context in _GROWTH_CONTEXTS], options
        )
        name = next(iter(libraries))
        plot(growth, name, options.output.with_suffix(".png"))
        result = {
            "machine": platform.processor() or platform.machine(),
            "isa": built.isa,
            "num_threads": options.threads,
            "read_num_threads": limits.num_threads,
            "read_gb_per_s": round(limits.gbytes, 1),
            "shapes": found,
            "growth": growth,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
