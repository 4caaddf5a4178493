"""Paged attention equals its plain reference on irregular shapes, and reads nothing else."""

import numpy as np
import pytest
import torch

from pageframe.kernels.ops.alibi import Alibi
from pageframe.kernels.ops.kv_write import kv_write
from pageframe.kernels.ops.paged_attention import PagedAttention
from pageframe.kernels.reference.paged_attention import paged_attention
from unit.kernels.pools import QUANTISED, garbage_pool

# (new tokens, context length) of each sequence.
_ONE_TOKEN_EACH = [(1, 1), (1, 5), (1, 17), (1, 16), (1, 63), (1, 64), (1, 65)]
_CHUNKS = [(7, 7), (3, 20), (2, 33)]
_MIXED = [(1, 40), (1, 9), (5, 5), (1, 1), (6, 23), (1, 22)]
# The computation's type decides; the reference reads the same stored numbers.
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Following this entry of a table would raise.
_OUTSIDE = 2**31 - 1
_HEADS = pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=["mha", "gqa", "mqa"])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _make(
    shapes,
    block_size,
    num_heads,
    num_kv_heads,
    *,
    head_dim=8,
    dtype=torch.float32,
    query_dtype=torch.float32,
    window=None,
    stale=_OUTSIDE,
    seed=0,
):
    """A pool full of NaN in which only what a sequence may see holds numbers.

    With a window, entries of blocks wholly before it are ``stale``: an id outside the pool, or
    that of a block in which nothing was ever written.
    """
    generator = torch.Generator().manual_seed(seed)
    context_lens = np.array([context for _, context in shapes], np.int32)
    query_start = np.cumsum([0] + [new for new, _ in shapes]).astype(np.int32)
    widths = -(-context_lens // block_size)
    num_blocks = int(widths.sum()) + 5
    scattered = np.random.default_rng(seed).permutation(num_blocks)
    block_tables = np.full((len(shapes), int(widths.max()) + 2), _OUTSIDE, np.int32)
    pool = garbage_pool(num_blocks, block_size, num_kv_heads, head_dim, dtype)
    taken = 1
    for sequence, (num_new, context_len) in enumerate(shapes):
        first_seen = 0 if window is None else max(0, context_len - num_new - window + 1)
        first_block = first_seen // block_size
        width = widths[sequence]
        block_tables[sequence, :width] = scattered[taken : taken + width]
        block_tables[sequence, :first_block] = scattered[0] if stale is None else stale
        taken += width
        positions = np.arange(first_seen, context_len)
        keys, values = torch.randn(2, positions.size, num_kv_heads, head_dim, generator=generator)
        kv_write(
            keys,
            values,
            pool.layer,
            torch.from_numpy(block_tables[sequence, positions // block_size].astype(np.int64)),
            torch.from_numpy(positions % block_size),
            kv_scales=pool.scales,
        )
    query = torch.randn(int(query_start[-1]), num_heads, head_dim, generator=generator)
    tables = {
        "query_start": query_start,
        "context_lens": context_lens,
        "block_tables": block_tables,
    }
    return query.to(query_dtype), pool, tables


def _assert_equals_reference(
    query, pool, tables, *, window=None, scale=0.3, attention=None, slopes=None
):
    attention = attention or PagedAttention(pool.layout.block_size, query.dtype, query.device)
    plan = attention.plan(**tables, window=window)
    alibi = None if slopes is None else Alibi(slopes)
    actual = attention.run(plan, query, pool.layer, scale, kv_scales=pool.scales, alibi=alibi)
    expected = paged_attention(
        query,
        pool.layer,
        **tables,
        scale=scale,
        window=window,
        kv_scales=pool.scales,
        slopes=slopes,
    )
    assert expected.isfinite().all()
    tolerance = _TOLERANCE[query.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, *QUANTISED])
@pytest.mark.parametrize("block_size", [1, 16, 128])
@_HEADS
@pytest.mark.parametrize("shapes", [_ONE_TOKEN_EACH, _CHUNKS, _MIXED])
def test_equals_reference(dtype, block_size, heads, shapes):
    query, pool, tables = _make(shapes, block_size, *heads, dtype=dtype)
    _assert_equals_reference(query, pool, tables)


# Of itself only, smaller than a block of 16, as large, between two, larger than any context.
@pytest.mark.parametrize("window", [1, 6, 16, 20, 1000])
@pytest.mark.parametrize("stale", [_OUTSIDE, None], ids=["outside", "never-written"])
@pytest.mark.parametrize("dtype", [torch.float32, *QUANTISED])
@pytest.mark.parametrize("block_size", [1, 16, 128])
@pytest.mark.parametrize("shapes", [_ONE_TOKEN_EACH, _CHUNKS, _MIXED])
def test_windows_read_nothing_before_themselves(window, stale, dtype, block_size, shapes):
    query, pool, tables = _make(shapes, block_size, 6, 2, dtype=dtype, window=window, stale=stale)
    _assert_equals_reference(query, pool, tables, window=window)


@_HEADS
@pytest.mark.parametrize("window", [6, 16])
def test_windows_of_all_kinds_of_heads(heads, window):
    query, pool, tables = _make(_MIXED, 16, *heads, dtype=torch.int8, window=window)
    _assert_equals_reference(query, pool, tables, window=window)


@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *QUANTISED])
def test_equals_reference_in_half_precision(computed, dtype):
    query, pool, tables = _make(_MIXED, 16, 6, 2, dtype=dtype, query_dtype=computed)
    _assert_equals_reference(query, pool, tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("window", [None, 30, 200])
def test_chunks_longer_than_a_tile(dtype, window):
    query, pool, tables = _make(
        [(131, 300), (260, 260)], 16, 2, 1, head_dim=4, dtype=dtype, window=window
    )
    _assert_equals_reference(query, pool, tables, window=window)


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("shapes", [_ONE_TOKEN_EACH, [(1, 30)] * 3, _CHUNKS, _MIXED])
@_HEADS
def test_scores_fall_with_distance(heads, shapes, window, query_dtype):
    query, pool, tables = _make(shapes, 4, *heads, query_dtype=query_dtype, window=window)
    # Neither a bias without its head's slope, nor one that all heads have, nor none passes.
    slopes = torch.linspace(0.05, 0.9, heads[0])
    _assert_equals_reference(query, pool, tables, window=window, slopes=slopes)
    with pytest.raises(AssertionError):
        _assert_equals_reference(
            query, pool, tables, window=window, slopes=slopes, attention=_Forgetful(4, query)
        )


class _Forgetful(PagedAttention):
    """Forgets that scores fall."""

    def __init__(self, block_size, query):
        super().__init__(block_size, query.dtype, query.device)

    def run(self, *arguments, alibi, **more):
        return super().run(*arguments, **more)


def test_keys_beyond_the_first_mask_band():
    query, pool, tables = _make([(3, 1500), (1, 1100), (2, 1030)], 64, 1, 1, head_dim=4)
    _assert_equals_reference(query, pool, tables)


@pytest.mark.parametrize("dtype", [torch.float32, *QUANTISED])
def test_scratch_of_an_earlier_step_leaves_no_trace(dtype):
    attention = PagedAttention(4, torch.float32, torch.device("cpu"))
    for seed, shapes in enumerate([_MIXED, _ONE_TOKEN_EACH, [(1, 2), (1, 3)], _CHUNKS]):
        for window in (None, 3):
            query, pool, tables = _make(shapes, 4, 4, 2, dtype=dtype, window=window, seed=seed)
            _assert_equals_reference(query, pool, tables, window=window, attention=attention)


def test_sixty_four_equal_decodes_share_calls():
    _, _, tables = _make([(1, 30)] * 64, 16, 2, 1)
    plan = PagedAttention(16, torch.float32, torch.device("cpu")).plan(**tables, window=None)
    assert len(plan.groups) == 1
    assert plan.groups[0].mask is None


def test_random_batches_equal_the_reference():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed={seed}")
    random = np.random.default_rng(seed)
    for _ in range(15):
        block_size = int(random.choice([1, 2, 8, 32]))
        context_lens = random.integers(1, 50, size=random.integers(1, 8))
        shapes = [
            (int(random.integers(1, min(length, 9) + 1)), int(length)) for length in context_lens
        ]
        window = None if random.random() < 0.5 else int(random.integers(1, 40))
        dtype = (torch.float32, torch.bfloat16, *QUANTISED)[random.integers(4)]
        query, pool, tables = _make(
            shapes, block_size, 4, 2, head_dim=4, dtype=dtype, window=window, seed=seed
        )
        _assert_equals_reference(query, pool, tables, window=window)


def test_refuses_shapes_that_do_not_belong_together():
    query, pool, tables = _make(_MIXED, 16, 6, 2)
    layer = pool.layer
    attention = PagedAttention(16, torch.float32, torch.device("cpu"))
    plan = attention.plan(**tables, window=None)
    with pytest.raises(ValueError, match="evenly"):
        attention.run(plan, query[:, :5], layer, 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        attention.run(plan, query[:, :, :4], layer, 1.0)
    with pytest.raises(ValueError, match="blocks of 16"):
        attention.run(plan, query, layer[:, :, :8], 1.0)
    with pytest.raises(ValueError, match="window is 0"):
        attention.plan(**tables, window=0)
    with pytest.raises(ValueError, match="scales for numbers"):
        attention.run(plan, query, layer, 1.0, kv_scales=torch.zeros(layer.shape[:-1]))
