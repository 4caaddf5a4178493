"""Swaps beside steps: what is left of a copy's time when the device computes meanwhile."""

import numpy as np
import torch

from bench.gpu.lab import Lab
from pageframe.executor.model.host_arena import HostArena

_NUM_BLOCKS = 64
_BLOCK_BYTES = 2 << 20
# Together about as long as 2 x 128 MiB over a bus of 50 GB/s, twice.
_NUM_PRODUCTS, _SIDE = 8, 8192

STEPS, SWAPS = "steps alone", "swaps alone"


def swaps_beside_steps(lab: Lab) -> None:
    """64 blocks out and 64 in, beside matrix products: both at once, and each alone."""
    count = lab.sizes.batch(_NUM_BLOCKS)
    block_bytes = lab.sizes.scaled(_BLOCK_BYTES, 4096)
    side = lab.sizes.scaled(_SIDE, 16)
    blocks = torch.zeros(2 * count, block_bytes, dtype=torch.uint8, device=lab.device)
    left, right = (torch.randn(side, side, dtype=lab.dtype, device=lab.device) for _ in range(2))
    product = torch.empty_like(left)
    host = HostArena(2 * count, block_bytes, lab.device)
    order = np.random.default_rng(0).permutation(2 * count)
    leaving, arriving = order[:count], order[count:]
    slots = np.arange(2 * count)

    def steps() -> None:
        for _ in range(_NUM_PRODUCTS):
            torch.mm(left, right, out=product)

    def begin_swaps() -> None:
        host.store(blocks, leaving, slots[:count])
        host.load(blocks, slots[count:], arriving, settles=False)

    def swaps() -> None:
        begin_swaps()
        host.settle()
        host.finish()

    def both() -> None:
        begin_swaps()
        steps()
        host.settle()
        host.finish()

    lab.record(
        "swaps beside steps",
        [both],
        num_bytes=2 * count * block_bytes,
        peers={STEPS: lambda: [steps], SWAPS: lambda: [swaps]},
        is_eager=True,
    )
