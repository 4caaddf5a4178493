"""What the pages of the KV pool do to it: how fast blocks are read, and what the first use costs.

    python -m bench.kv_pages [--seconds 20] [--output FILE]

Reading is of one layer's part of each block of a pool, one block after the other or in random
order, and nothing is computed: no attention of decodes can be faster. "End to end" is how a pool
would be read whose blocks held one layer alone and followed each other. Parts have the sizes of
SmolLM2-135M with blocks of 16 tokens. First use writes one byte of each small page of 2 MiB that
were never written. The pool lies on the product's pages and on small ones, which take turns. One
thread; its own time counts, which does not run while another process has the core; a speed is the
best of many turns, because others only ever make one slower.
"""

import argparse
import json
import mmap
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.cpu_limits import Limits, Read
from pageframe.executor.model.reserved_range import ReservedRange
from pageframe.kernels.cpu.library import CpuLibrary, load

PAGES = ("large", "small")
_NUM_LAYERS = 30
_PIECE_BYTES = {"int8": 6144, "bf16": 12_288, "fp32": 24_576}
_POOL_BYTES = 1 << 28
_TURN_BYTES = 1 << 22
_TOUCH_BYTES = 2 << 20
_NUM_TOUCHES = 64
_SEED = 20241121

Reading = Callable[[int], Read]
"""Reads layer n of some blocks."""


def pool_memory(num_bytes: int, pages: str) -> torch.Tensor:
    """Zeros that nobody has touched, uint8 [num_bytes].

    Args:
        num_bytes: How many.
        pages: ``large`` for memory as the product's pool has it, ``small`` for small pages alone.
    """
    if pages == "large":
        return torch.frombuffer(ReservedRange(num_bytes).buffer, dtype=torch.uint8)
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


class KvLimits(Limits):
    """Limits of some threads, that of reading blocks among them."""

    def reading(
        self, blocks: torch.Tensor, block_ids: NDArray[np.integer[Any]], piece_bytes: int
    ) -> Reading:
        """Reads one layer of blocks, in the order of ``block_ids``, and computes nothing.

        Each thread has an even share of them, one after the other.

        Args:
            blocks: uint8, shape (num_blocks, block_bytes).
            block_ids: integers, any shape.
            piece_bytes: Keys and values of one layer in a block; a multiple of 768.
        """
        places = block_ids.astype(np.int64).ravel() * blocks.shape[1]
        return lambda layer: self.read_pieces(
            blocks.data_ptr() + layer * piece_bytes, places, piece_bytes
        )


def first_use(pages: str) -> dict[str, float]:
    """Microseconds that it takes to write to 2 MiB of small pages for the first time."""
    memory = pool_memory(_NUM_TOUCHES * _TOUCH_BYTES, pages)
    found = []
    for part in memory.view(_NUM_TOUCHES, _TOUCH_BYTES):
        start = time.thread_time()
        part[:: mmap.PAGESIZE].fill_(1)
        found.append((time.thread_time() - start) * 1e6)
    return {"median": round(statistics.median(found), 1), "most": round(max(found), 1)}


def speeds(limits: KvLimits, num_seconds: float) -> list[dict[str, Any]]:
    """GB/s of each size of piece, order and kind of page; all orders and pages take turns."""
    pools = {pages: pool_memory(_POOL_BYTES, pages).fill_(1) for pages in PAGES}
    rng = np.random.default_rng(_SEED)
    found = []
    for dtype, piece_bytes in _PIECE_BYTES.items():
        block_bytes = _NUM_LAYERS * piece_bytes
        num_blocks = _POOL_BYTES // block_bytes
        num_read = min(num_blocks, _TURN_BYTES // piece_bytes)
        readings = {}
        for pages, pool in pools.items():
            blocks = pool[: num_blocks * block_bytes].view(num_blocks, block_bytes)
            anywhere = rng.permutation(num_blocks)[:num_read]
            readings["blocks anywhere", pages] = limits.reading(blocks, anywhere, piece_bytes)
            in_turn = np.arange(num_read)
            readings["blocks in turn", pages] = limits.reading(blocks, in_turn, piece_bytes)
            pieces = pool[: num_read * _NUM_LAYERS * piece_bytes].view(-1, piece_bytes)
            readings["end to end", pages] = limits.reading(pieces, in_turn, piece_bytes)
        best = dict.fromkeys(readings, float("inf"))
        layer = 0
        end = time.perf_counter() + num_seconds / len(_PIECE_BYTES)
        while time.perf_counter() < end:
            limits.measure()
            layer = (layer + 1) % _NUM_LAYERS
            # Nothing may be in a cache: no order reads what another has just read.
            places = {
                "blocks anywhere": layer,
                "blocks in turn": (layer + _NUM_LAYERS // 3) % _NUM_LAYERS,
                "end to end": (layer + 2 * _NUM_LAYERS // 3) % _NUM_LAYERS * num_read,
            }
            for (order, pages), read in readings.items():
                place = places[order]
                best[order, pages] = min(best[order, pages], read(place).seconds)
        num_bytes = num_read * piece_bytes
        for (order, pages), seconds in best.items():
            found.append(
                {
                    "dtype": dtype,
                    "piece_bytes": piece_bytes,
                    "order": order,
                    "pages": pages,
                    "gb_per_s": round(num_bytes / seconds / 1e9, 2),
                }
            )
            print(found[-1], file=sys.stderr)
    return found


def measure(library: CpuLibrary, num_seconds: float) -> dict[str, Any]:
    """Everything, as it is written to the file."""
    limits = KvLimits(library)
    # Freed and taken again in turns, so that both kinds come from memory that is really there.
    for _ in range(2):
        uses = {pages: first_use(pages) for pages in PAGES}
    print(f"first use of 2 MiB, us: {uses}", file=sys.stderr)
    found = speeds(limits, num_seconds)
    return {
        "machine": platform.processor() or platform.machine(),
        "isa": library.isa,
        "read_gb_per_s": round(limits.gbytes, 1),
        "first_use_us_per_2_mib": uses,
        "reading": found,
    }


def main() -> int:
    """Measure and print; write JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of reading, in all")
    parser.add_argument("--output", type=Path, help="write JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(load(None), options.seconds)
    text = json.dumps(result, indent=1) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
