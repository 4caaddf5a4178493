"""Triton's paged attention equals its plain reference on irregular shapes, and reads no more."""

import numpy as np
import pytest
import torch

from unit.kernels.triton.attention_batches import make_batch

# (new tokens, context length) of each sequence.
_ONE_TOKEN_EACH = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 257), (1, 700)]
_CHUNKS = [(7, 7), (3, 20), (40, 57), (2, 130)]
_MIXED = [(1, 40), (9, 257), (1, 1), (5, 5), (1, 300)]
_QUANTISED = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])


@pytest.mark.parametrize(
    ("block_size", "heads", "head_dim"),
    [
        (16, (1, 1), 128),
        (8, (6, 2), 64),
        (64, (4, 1), 96),
        (16, (8, 1), 80),
        (24, (2, 2), 16),
        (256, (3, 1), 64),
    ],
)
@pytest.mark.parametrize("shapes", [_ONE_TOKEN_EACH, _CHUNKS], ids=["decode", "prefill"])
def test_equals_reference(device, block_size, heads, head_dim, shapes):
    batch = make_batch(shapes, block_size=block_size, heads=heads, head_dim=head_dim)
    batch.assert_equals_reference(device)


def test_one_batch_may_hold_both_kinds(device):
    make_batch(_MIXED).assert_equals_reference(device)


def test_more_heads_in_a_group_than_rows_in_a_tile(device):
    make_batch([(1, 20), (1, 300)], heads=(20, 1), head_dim=16).assert_equals_reference(device)
    make_batch([(3, 20)], heads=(40, 1), head_dim=16).assert_equals_reference(device)


# Itself only, less than a block, a block, between two, several tiles, more than any context.
@pytest.mark.parametrize("window", [1, 6, 16, 20, 70, 1000])
@pytest.mark.parametrize(
    "shapes", [_ONE_TOKEN_EACH, [(50, 150), (9, 40)]], ids=["decode", "prefill"]
)
def test_windows_read_nothing_before_themselves(device, window, shapes):
    make_batch(shapes, window=window).assert_equals_reference(device)


def test_a_window_that_leaves_tiles_without_a_mask(device):
    make_batch([(20, 400)], window=200, heads=(2, 1)).assert_equals_reference(device)


# Tiles have 32 keys, and the first new token stands right before, at and behind their edges; so
# does, in the second half, the first key that it sees.
@pytest.mark.parametrize("window", [None, 40])
def test_every_row_sees_up_to_itself_at_the_edges_of_tiles(device, window):
    firsts = [30, 31, 32, 33, 69, 70, 71, 72]
    make_batch(
        [(3, first + 3) for first in firsts], heads=(1, 1), head_dim=16, window=window
    ).assert_equals_reference(device)


@_QUANTISED
@pytest.mark.parametrize("window", [None, 20])
def test_one_byte_numbers(device, dtype, window):
    make_batch(_MIXED, dtype=dtype, window=window, head_dim=80).assert_equals_reference(device)


@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_half_precision(device, computed, dtype):
    batch = make_batch(_MIXED, dtype=dtype or computed, query_dtype=computed)
    batch.assert_equals_reference(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_scores_may_fall_with_distance(device, dtype):
    make_batch(_MIXED, dtype=dtype, has_slopes=True, heads=(6, 2)).assert_equals_reference(device)
    make_batch([(9, 70)], window=20, has_slopes=True).assert_equals_reference(device)


def test_large_scores_neither_overflow_nor_vanish(device):
    batch = make_batch([(1, 300), (5, 40)])
    batch.query.mul_(1000.0)
    batch.assert_equals_reference(device)


def test_queries_may_be_a_part_of_a_wider_row(device):
    batch = make_batch(_MIXED)
    num_tokens, num_heads, head_dim = batch.query.shape
    wide = torch.full((num_tokens, num_heads + 2, head_dim), torch.nan)
    wide[:, :num_heads] = batch.query
    attention = batch.attention(device)
    plan = attention.plan(**batch.tables, window=None)
    layer = batch.pool.rows.to(device).view(torch.float32)[
        :, : batch.pool.layout.num_elements_per_block
    ]
    layer = layer.view(-1, *batch.pool.layout.block_shape)[:, 1]
    actual = attention.run(plan, wide.to(device)[:, :num_heads], layer, batch.scale)
    batch.assert_expected(actual.cpu())


def test_no_tokens_are_no_work(device):
    batch = make_batch([(1, 5)])
    attention = batch.attention(device)
    plan = attention.plan(
        query_start=np.zeros(1, np.int32),
        context_lens=np.zeros(0, np.int32),
        block_tables=np.zeros((0, 4), np.int32),
        window=None,
    )
    empty = batch.query[:0].to(device)
    layer = batch.pool.layer.to(device)
    assert attention.run(plan, empty, layer, 1.0).shape == (0, 4, 64)


def test_random_batches_equal_the_reference(device):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed={seed}")
    random = np.random.default_rng(seed)
    for _ in range(6):
        lengths = random.integers(1, 400, size=random.integers(1, 5))
        make_batch(
            [(int(random.integers(1, min(length, 12) + 1)), int(length)) for length in lengths],
            block_size=int(random.choice([1, 8, 16, 48])),
            heads=((4, 1), (3, 1), (1, 1))[random.integers(3)],
            head_dim=int(random.choice([16, 24])),
            dtype=(torch.float32, torch.int8, torch.float8_e4m3fn)[random.integers(3)],
            window=None if random.random() < 0.5 else int(random.integers(1, 200)),
            has_slopes=bool(random.integers(2)),
            seed=seed,
        ).assert_equals_reference(device)
