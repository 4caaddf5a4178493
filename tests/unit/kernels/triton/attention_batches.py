"""Batches for tests of attention: a pool of NaN, with numbers only where a sequence may look."""

from dataclasses import dataclass

import numpy as np
import torch

from pageframe.kernels.jit.attention_tiles import AttentionTiles, Tile
from pageframe.kernels.ops.alibi import Alibi
from pageframe.kernels.ops.kv_write import kv_write
from pageframe.kernels.ops.triton_attention import TritonAttention
from pageframe.kernels.reference.paged_attention import paged_attention
from unit.kernels.pools import Pool, garbage_pool

# Following this entry of a block table would leave the pool by far.
OUTSIDE = 2**31 - 1
# The reference is exact; products in half precision round their weights too.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Small ones, so that few keys already are many tiles and parts.
TILES = AttentionTiles(
    decode=Tile(16, 64, 4, 1),
    prefill=Tile(32, 32, 4, 1),
    short_prefill=Tile(16, 32, 4, 1),
    prefix=Tile(16, 128, 4, 1),
    num_decode_programs=16,
)


@dataclass(frozen=True)
class Batch:
    """One step over a pool, all of it on the CPU; arguments as in the reference."""

    query: torch.Tensor
    pool: Pool
    tables: dict[str, np.ndarray]
    window: int | None
    slopes: torch.Tensor | None
    scale: float = 0.3

    @property
    def expected(self):
        """What the reference says."""
        return paged_attention(
            self.query,
            self.pool.layer,
            **self.tables,
            scale=self.scale,
            window=self.window,
            kv_scales=self.pool.scales,
            slopes=self.slopes,
        )

    def attention(self, device, **options):
        """Attention for this batch's types."""
        options.setdefault("tiles", TILES if device.type == "cpu" else None)
        return TritonAttention(
            self.pool.layout, self.query.shape[1], self.query.dtype, device, **options
        )

    def run(self, attention, plan):
        """One layer, on the device of the plan; the result on the CPU."""
        device = plan.packed.device
        pool = Pool(self.pool.layout, self.pool.rows.to(device))
        return attention.run(
            plan,
            self.query.to(device),
            pool.layer,
            self.scale,
            kv_scales=pool.scales,
            alibi=None if self.slopes is None else Alibi(self.slopes.to(device)),
        ).cpu()

    def assert_equals_reference(self, device, **options):
        """Plan and run once; returns the plan."""
        attention = self.attention(device, **options)
        plan = attention.plan(**self.tables, window=self.window)
        self.assert_expected(self.run(attention, plan))
        return plan

    def assert_expected(self, actual):
        """``actual`` is what the reference says."""
        expected = self.expected
        assert expected.isfinite().all()
        tolerance = TOLERANCE[self.query.dtype]
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def make_batch(
    shapes,
    *,
    block_size=16,
    heads=(4, 1),
    head_dim=64,
    dtype=torch.float32,
    query_dtype=torch.float32,
    window=None,
    has_slopes=False,
    shared=(),
    seed=0,
):
    """A batch of (new tokens, context length) sequences with random blocks.

    Entries of blocks wholly before a window, or past a context, leave the pool. ``shared`` lists
    (sequences, blocks): the tables of these sequences begin with the same blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    context_lens = np.array([context for _, context in shapes], np.int32)
    query_start = np.cumsum([0] + [new for new, _ in shapes]).astype(np.int32)
    num_blocks = int((-(-context_lens // block_size)).sum()) + 3
    free = iter(np.random.default_rng(seed).permutation(num_blocks).tolist())
    tables = np.full(
        (len(shapes), -(-int(context_lens.max()) // block_size) + 2), OUTSIDE, np.int32
    )
    for sequences, count in shared:
        tables[sequences, :count] = [next(free) for _ in range(count)]
    pool = garbage_pool(num_blocks, block_size, heads[1], head_dim, dtype)
    for sequence, (num_new, context_len) in enumerate(shapes):
        low = 0 if window is None else max(0, context_len - num_new - window + 1)
        own = range(low // block_size, -(-context_len // block_size))
        for column in own:
            if tables[sequence, column] == OUTSIDE:
                tables[sequence, column] = next(free)
        positions = np.arange(low, context_len)
        keys, values = torch.randn(2, positions.size, heads[1], head_dim, generator=generator)
        kv_write(
            keys,
            values,
            pool.layer,
            torch.from_numpy(tables[sequence, positions // block_size].astype(np.int64)),
            torch.from_numpy(positions % block_size),
            kv_scales=pool.scales,
        )
    query = torch.randn(int(query_start[-1]), heads[0], head_dim, generator=generator)
    return Batch(
        query=query.to(query_dtype),
        pool=pool,
        tables={
            "query_start": query_start,
            "context_lens": context_lens,
            "block_tables": tables,
        },
        window=window,
        slopes=torch.rand(heads[0], generator=generator) if has_slopes else None,
    )
