"""Keys that sequences share are read once for all of them, and results stay the same."""

import numpy as np
import pytest
import torch

from pageframe.kernels.ops.triton_attention_plan import StepPlanner
from unit.kernels.triton.attention_batches import TILES, make_batch

# Six sequences, the first five of which share 1,600 keys: 100 blocks of 16.
_SHAPES = [(1, 1601), (1, 1630), (1, 1700), (1, 1610), (1, 1604), (1, 1650)]
_SHARED = [([0, 1, 2, 3, 4], 100)]


def _planner(**options):
    return StepPlanner(
        **{
            "block_size": 16,
            "group_size": 4,
            "num_kv_heads": 1,
            "tiles": TILES,
            "is_deterministic": False,
            **options,
        }
    )


def _tables(sequences, context_lens, width=200):
    """One new token each; ``sequences`` lists the first blocks of each, the rest are its own."""
    tables = np.arange(10_000, 10_000 + len(context_lens) * width, dtype=np.int32)
    tables = tables.reshape(len(context_lens), width)
    for sequence, blocks in enumerate(sequences):
        tables[sequence, : len(blocks)] = blocks
    return {
        "query_start": np.arange(len(context_lens) + 1, dtype=np.int32),
        "context_lens": np.array(context_lens, np.int32),
        "block_tables": tables,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_sharing_changes_no_result(device, dtype):
    batch = make_batch(_SHAPES, heads=(4, 1), head_dim=16, shared=_SHARED, dtype=dtype)
    plan = batch.assert_equals_reference(device)
    assert plan.room.num_prefixes > 1
    # The slots that share are cut behind their prefix.
    assert sorted(plan.slots[2].tolist()) == [0, 1600, 1600, 1600, 1600, 1600]


def test_sharing_with_slopes_two_key_heads_and_chunks_beside_it(device):
    batch = make_batch(
        [*_SHAPES[:5], (5, 9)],
        heads=(6, 2),
        head_dim=16,
        shared=_SHARED,
        has_slopes=True,
    )
    assert batch.assert_equals_reference(device).room.num_prefixes > 1


def test_slots_of_a_group_lie_side_by_side_and_items_cover_them_and_the_prefix():
    shared = list(range(100))
    sequences = [shared, [], shared, [], shared, shared, shared]
    step = _planner().step(
        **_tables(sequences, [1700, 1800, 1650, 40, 1601, 1700, 2000]), window=None
    )
    assert step.slots[1].tolist() == [0, 2, 4, 5, 6, 1, 3]
    assert step.slots[2].tolist() == [1600] * 5 + [0, 0]
    # Rows of four slots fit a tile of 16: two tiles, over each part of the prefix.
    spans = {tuple(item[1:3]) for item in step.prefixes.tolist()}
    assert spans == {(0, 4), (4, 1)}
    for span in spans:
        parts = [item[3:6] for item in step.prefixes.tolist() if tuple(item[1:3]) == span]
        assert [part[2] for part in parts] == list(range(len(parts)))
        assert [part[0] for part in parts] == [0, *(part[1] for part in parts[:-1])]
        assert parts[-1][1] == 1600
        assert step.slots[4].tolist() == [len(parts)] * 5 + [0, 0]


def test_the_newest_key_is_never_shared():
    # All 100 blocks are common, but the last one holds the new tokens.
    step = _planner().step(**_tables([range(100)] * 5, [1600, 1599, 1600, 1585, 1600]), window=None)
    assert step.slots[2].tolist() == [1584] * 5


def test_equal_blocks_behind_different_ones_are_not_a_prefix():
    other = [9_999, *range(1, 100)]
    tables = _tables([range(100), other, range(100), other, other], [1700] * 5)
    assert _planner().step(**tables, window=None).prefixes.size == 0


@pytest.mark.parametrize(
    ("options", "sequences", "context_len", "window"),
    [
        ({}, [range(15)] * 40, 1700, None),
        ({}, [range(100)] * 3, 1700, None),
        ({}, [range(100)] * 5, 1700, 2000),
        ({"is_deterministic": True}, [range(100)] * 5, 1700, None),
        ({"group_size": 17}, [range(100)] * 5, 1700, None),
    ],
    ids=["short", "too-few-keys-saved", "window", "deterministic", "more-heads-than-rows"],
)
def test_sequences_do_not_share_where_it_does_not_pay_or_may_not_be(
    options, sequences, context_len, window
):
    tables = _tables(sequences, [context_len] * len(sequences))
    step = _planner(**options).step(**tables, window=window)
    assert step.prefixes.size == 0
    assert not step.slots[4].any()


def test_tiles_with_most_keys_run_first():
    tables = {
        "query_start": np.array([0, 20, 21, 61], np.int32),
        "context_lens": np.array([20, 5, 100], np.int32),
        "block_tables": np.zeros((3, 8), np.int32),
    }
    step = _planner().step(**tables, window=None)
    assert not step.has_short_chunks
    # Rows are tokens times 4 heads in tiles of 32: 3 tiles of the first, 5 of the last.
    assert [item[:5] for item in step.chunks.tolist()] == [
        [2, 21, 40, 128, 100],
        [2, 21, 40, 96, 100],
        [2, 21, 40, 64, 100],
        [2, 21, 40, 32, 100],
        [2, 21, 40, 0, 100],
        [0, 0, 20, 64, 20],
        [0, 0, 20, 32, 20],
        [0, 0, 20, 0, 20],
    ]


@pytest.mark.parametrize(("num_tokens", "is_short"), [(4, True), (5, False)])
def test_short_tiles_are_for_batches_of_short_chunks(num_tokens, is_short):
    tables = {
        "query_start": np.array([0, 2, 2 + num_tokens], np.int32),
        "context_lens": np.array([50, 60], np.int32),
        "block_tables": np.zeros((2, 8), np.int32),
    }
    assert _planner().step(**tables, window=None).has_short_chunks == is_short
    assert not _planner(is_deterministic=True).step(**tables, window=None).has_short_chunks
