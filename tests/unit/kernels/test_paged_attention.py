"""Paged attention equals its plain reference on irregular shapes, and reads nothing else."""

import numpy as np
import pytest
import torch

from pageframe.kernels.ops.paged_attention import PagedAttention
from pageframe.kernels.reference.paged_attention import paged_attention

# (new tokens, context length) of each sequence.
_ONE_TOKEN_EACH = [(1, 1), (1, 5), (1, 17), (1, 16), (1, 63), (1, 64), (1, 65)]
_CHUNKS = [(7, 7), (3, 20), (2, 33)]
_MIXED = [(1, 40), (1, 9), (5, 5), (1, 1), (6, 23), (1, 22)]
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _make(shapes, block_size, num_heads, num_kv_heads, head_dim=8, dtype=torch.float32, seed=0):
    """A pool full of NaN in which only the sequences' own slots hold numbers."""
    generator = torch.Generator().manual_seed(seed)
    context_lens = np.array([context for _, context in shapes], np.int32)
    query_start = np.cumsum([0] + [new for new, _ in shapes]).astype(np.int32)
    widths = -(-context_lens // block_size)
    num_blocks = int(widths.sum()) + 5
    scattered = np.random.default_rng(seed).permutation(num_blocks)
    # Undefined entries point outside the pool: following one would raise.
    block_tables = np.full((len(shapes), int(widths.max()) + 2), 2**31 - 1, np.int32)
    arena = torch.full(
        (num_blocks, 3, 2, block_size, num_kv_heads, head_dim), torch.nan, dtype=dtype
    )
    layer = arena[:, 1]
    taken = 0
    for sequence, width in enumerate(widths):
        block_tables[sequence, :width] = scattered[taken : taken + width]
        taken += width
        for position in range(context_lens[sequence]):
            block_id = int(block_tables[sequence, position // block_size])
            layer[block_id, :, position % block_size] = torch.randn(
                2, num_kv_heads, head_dim, generator=generator
            ).to(dtype)
    query = torch.randn(int(query_start[-1]), num_heads, head_dim, generator=generator).to(dtype)
    tables = {
        "query_start": query_start,
        "context_lens": context_lens,
        "block_tables": block_tables,
    }
    return query, layer, tables


def _assert_equals_reference(query, layer, tables, block_size, window=None, scale=0.3):
    attention = PagedAttention(block_size, query.dtype, query.device)
    plan = attention.plan(**tables, window=window)
    actual = attention.run(plan, query, layer, scale)
    expected = paged_attention(query, layer, **tables, scale=scale, window=window)
    tolerance = _TOLERANCE[query.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("window", [None, 1, 6, 20])
@pytest.mark.parametrize("shapes", [_ONE_TOKEN_EACH, _CHUNKS, _MIXED])
def test_equals_reference(block_size, heads, window, shapes):
    query, layer, tables = _make(shapes, block_size, *heads)
    _assert_equals_reference(query, layer, tables, block_size, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_reference_in_half_precision(dtype):
    query, layer, tables = _make(_MIXED, 16, 6, 2, dtype=dtype)
    _assert_equals_reference(query, layer, tables, 16)


@pytest.mark.parametrize("window", [None, 30, 200])
def test_chunks_longer_than_a_tile(window):
    query, layer, tables = _make([(131, 300), (260, 260)], 16, 2, 1, head_dim=4)
    _assert_equals_reference(query, layer, tables, 16, window)


def test_keys_beyond_the_first_mask_band():
    query, layer, tables = _make([(3, 1500), (1, 1100), (2, 1030)], 64, 1, 1, head_dim=4)
    _assert_equals_reference(query, layer, tables, 64)


def test_scratch_of_an_earlier_step_leaves_no_trace():
    attention = PagedAttention(4, torch.float32, torch.device("cpu"))
    for seed, shapes in enumerate([_MIXED, _ONE_TOKEN_EACH, [(1, 2), (1, 3)], _CHUNKS]):
        query, layer, tables = _make(shapes, 4, 4, 2, seed=seed)
        for window in (None, 3):
            plan = attention.plan(**tables, window=window)
            actual = attention.run(plan, query, layer, 1.0)
            expected = paged_attention(query, layer, **tables, scale=1.0, window=window)
            torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


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
        query, layer, tables = _make(shapes, block_size, 4, 2, head_dim=4, seed=seed)
        _assert_equals_reference(query, layer, tables, block_size, window)


def test_refuses_shapes_that_do_not_belong_together():
    query, layer, tables = _make(_MIXED, 16, 6, 2)
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
