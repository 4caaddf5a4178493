"""Cutting keys into parts and merging them: equal to plain versions, and fit for CUDA graphs."""

import numpy as np
import pytest
import torch

from pageframe.kernels.jit.merge_splits import merge_splits
from pageframe.kernels.jit.split_plan import split_plan
from pageframe.kernels.ops.triton_attention_plan import ITEM_FIELDS, MERGE_FIELDS, Room
from pageframe.kernels.reference.merge_splits import merge_splits as merge_plainly
from pageframe.kernels.reference.split_plan import split_plan as split_plainly
from unit.kernels.triton.attention_batches import make_batch

_TILE = 64


def _split(device, first_keys, context_lens, num_shared, *, target_items, tiles_min, tiles_fixed=0):
    """What the kernel makes of slots that follow tokens 10, 11, ... and sequences 20, 21, ..."""
    count = len(context_lens)
    slots = np.array(
        [range(10, 10 + count), range(20, 20 + count), first_keys, context_lens, num_shared],
        np.int32,
    )
    num_tiles = int((-(-(slots[3] - slots[2]) // _TILE)).sum())
    num_items = num_tiles if tiles_fixed else count + target_items
    items = torch.full((num_items + 1, ITEM_FIELDS), -7, dtype=torch.int32, device=device)
    merges = torch.full((count + 1, MERGE_FIELDS), -7, dtype=torch.int32, device=device)
    split_plan[(1,)](
        torch.from_numpy(slots).to(device),
        items,
        merges,
        count,
        num_items,
        SLOTS=64,
        TARGET_ITEMS=target_items,
        TILE=_TILE,
        TILES_MIN=tiles_min,
        TILES_FIXED=tiles_fixed,
    )
    # One row past the end shows that nothing is written there.
    assert (items[-1] == -7).all()
    assert (merges[-1] == -7).all()
    return items[:-1].tolist(), merges[:-1].tolist()


def _assert_equals_plain(device, first_keys, context_lens, num_shared, **options):
    items, merges = _split(device, first_keys, context_lens, num_shared, **options)
    expected_items, expected_merges = split_plainly(
        first_keys, context_lens, num_shared, tile=_TILE, **options
    )
    assert [tuple(merge[1:3]) for merge in merges] == expected_merges
    assert [merge[0] for merge in merges] == list(range(10, 10 + len(context_lens)))
    last_of = [context_len - 1 for context_len in context_lens]
    actual = [item[:6] for item in items if item[3] > item[2]]
    assert actual == [
        [10 + item.slot, 20 + item.slot, item.start, item.end, item.partial, last_of[item.slot]]
        for item in expected_items
    ]


def test_one_long_sequence_gets_the_parts_that_many_short_ones_leave(device):
    items, merges = _split(device, [0] * 4, [64, 64, 64, 640], [0] * 4, target_items=4, tiles_min=1)
    # 13 tiles over 4 items: at most 4 tiles each; 10 tiles are 3 items of 4, 4 and 2.
    assert [item[2:5] for item in items] == [
        [0, 64, -1],
        [0, 64, -1],
        [0, 64, -1],
        [0, 256, 3],
        [256, 512, 4],
        [512, 640, 5],
        [0, 0, -7],
        [0, 0, -7],
    ]
    assert [merge[:3] for merge in merges] == [[10, 0, 1], [11, 1, 1], [12, 2, 1], [13, 3, 3]]


def test_an_empty_slot_has_no_items_and_no_partials(device):
    items, merges = _split(device, [0, 0], [0, 10], [0, 0], target_items=2, tiles_min=1)
    assert [item[2:4] for item in items] == [[0, 10], [0, 0], [0, 0], [0, 0]]
    assert [merge[2] for merge in merges] == [0, 1]


@pytest.mark.parametrize("tiles_fixed", [0, 2])
def test_random_slots_are_cut_as_the_plain_version_cuts_them(device, tiles_fixed):
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed={seed}")
    random = np.random.default_rng(seed)
    for _ in range(20):
        count = int(random.integers(1, 12))
        first_keys = random.integers(0, 300, size=count)
        lens = random.integers(0, 3000, size=count)
        _assert_equals_plain(
            device,
            first_keys.tolist(),
            (first_keys + lens).tolist(),
            random.integers(0, 3, size=count).tolist(),
            target_items=int(random.integers(1, 30)),
            tiles_min=int(random.integers(1, 5)),
            tiles_fixed=tiles_fixed,
        )


@pytest.mark.parametrize("num_partials", [2, 8, 19])
def test_merging_weighs_parts_by_what_they_saw(device, num_partials):
    generator = torch.Generator().manual_seed(num_partials)
    means = torch.randn(num_partials + 3, 2, 24, generator=generator)
    lse = torch.randn(num_partials + 3, 2, generator=generator) * 8
    # A part that saw nothing, and what a neighbour left.
    lse[3] = -torch.inf
    means[3] = 0.0
    means[:2], lse[:2] = torch.nan, torch.nan
    means[-1], lse[-1] = torch.nan, torch.nan
    merges = torch.tensor([[1, 2, num_partials, 0], [0, 0, 1, 0], [2, 0, 0, 0]], dtype=torch.int32)
    output = torch.full((3, 2, 24), 7.0, device=device)
    merge_splits[2, 3](
        means.to(device),
        lse.to(device),
        merges.to(device),
        output,
        NUM_HEADS=2,
        PARTS=8,
        DIM=32,
        HEAD_DIM=24,
    )
    expected = merge_plainly(means[2 : 2 + num_partials], lse[2 : 2 + num_partials])
    torch.testing.assert_close(output[1].cpu().double(), expected, atol=1e-6, rtol=1e-6)
    # A token of one part keeps what the part itself has written; one of none gets zeros.
    assert (output[0] == 7.0).all()
    assert not output[2].any()


def test_parts_that_all_saw_nothing_are_zero(device):
    output = torch.full((1, 1, 16), 7.0, device=device)
    merge_splits[1, 1](
        torch.zeros(2, 1, 16, device=device),
        torch.full((2, 1), -torch.inf, device=device),
        torch.tensor([[0, 0, 2, 0]], dtype=torch.int32, device=device),
        output,
        NUM_HEADS=1,
        PARTS=8,
        DIM=16,
        HEAD_DIM=16,
    )
    assert not output.any()


_DECODES = [(1, 700), (1, 30), (1, 1100)]


def _alone(batch, sequence):
    """Tables of one sequence of a batch of one-token sequences."""
    return {
        "query_start": np.array([0, 1], np.int32),
        "context_lens": batch.tables["context_lens"][[sequence]],
        "block_tables": batch.tables["block_tables"][[sequence]],
    }


def test_a_deterministic_result_does_not_depend_on_the_batch(device):
    batch = make_batch(_DECODES, heads=(2, 1), head_dim=32)
    attention = batch.attention(device, is_deterministic=True)
    together = batch.run(attention, attention.plan(**batch.tables, window=None)).clone()
    batch.assert_expected(together)
    for sequence in range(len(_DECODES)):
        plan = attention.plan(**_alone(batch, sequence), window=None)
        query = batch.query[sequence : sequence + 1].to(device)
        layer = batch.pool.layer.to(device)
        alone = attention.run(plan, query, layer, batch.scale).cpu()
        assert torch.equal(alone[0], together[sequence])


def _cut_as(device, batch, **options):
    attention = batch.attention(device, **options)
    plan = attention.plan(**batch.tables, window=None)
    items = plan.items.tolist()
    return [item[2:4] for item in items if item[1] == 2 and item[3] > item[2]]


def test_only_a_deterministic_plan_cuts_without_looking_at_the_batch(device):
    long_one = [(1, 30), (1, 30), (1, 1100)]
    crowded = [(1, 3000), (1, 3000), (1, 1100)]
    batches = [make_batch(shapes, heads=(1, 1), head_dim=16) for shapes in (long_one, crowded)]
    fixed = [_cut_as(device, batch, is_deterministic=True) for batch in batches]
    assert fixed == [[[0, 512], [512, 1024], [1024, 1100]]] * 2
    free = [_cut_as(device, batch) for batch in batches]
    assert len(free[0]) > len(free[1])


def test_a_plan_is_filled_again_at_the_same_addresses_and_with_room_to_spare(device):
    first = make_batch(_DECODES, heads=(2, 1), head_dim=32)
    attention = first.attention(device)
    needed = attention.plan(**first.tables, window=None).room
    room = Room(
        num_slots=5,
        num_items=needed.num_items + 4,
        num_partials=needed.num_partials + 4,
        num_prefixes=2,
        num_chunks=3,
        num_sequences=6,
        table_width=needed.table_width + 7,
    )
    plan = attention.plan(**first.tables, window=None, room=room)
    first.assert_expected(first.run(attention, plan))
    addresses = [plan.packed.data_ptr(), plan.items.data_ptr(), plan.merges.data_ptr()]
    for seed, shapes in enumerate([[(1, 40)], [(1, 700), (1, 1), (9, 30)], _DECODES]):
        batch = make_batch(shapes, heads=(2, 1), head_dim=32, seed=seed)
        attention.refill(plan, **batch.tables)
        batch.assert_expected(batch.run(attention, plan))
    assert addresses == [plan.packed.data_ptr(), plan.items.data_ptr(), plan.merges.data_ptr()]
    with pytest.raises(ValueError, match="num_slots of this step is 6, with room for 5"):
        attention.refill(plan, **make_batch([(1, 1)] * 6, heads=(2, 1), head_dim=32).tables)
