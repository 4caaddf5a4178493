"""Plans of decodes in memory of others, with room for any batch: what a CUDA graph holds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pageframe.executor.model.graph_recorder import CudaRecorder
from pageframe.kernels.ops.triton_attention_plan import (
    ITEM_FIELDS,
    MERGE_FIELDS,
    PREFIX_FIELDS,
    SLOT_FIELDS,
    StepPlanner,
)
from pageframe.kernels.ops.triton_attention_tables import decode_plan, fill_decode
from unit.kernels.triton.attention_batches import TILES, make_batch
from unit.model.tape import TapeRecorder

_SHARED = [([0, 1, 2, 3, 4], 100)]
_SHARING = [(1, 1601), (1, 1630), (1, 1700), (1, 1610), (1, 1604)]
_WIDTH = 120


class _Plans:
    """Memory of plans for up to ``most`` sequences, and a plan in it for each size."""

    def __init__(self, attention, most, device):
        self._attention = attention
        self._room = attention.decode_room(most, _WIDTH, window=None)

        def numbers(*shape):
            # What lies there before says nothing.
            return torch.full(shape, 77, dtype=torch.int32, device=device)

        self.slots = numbers(SLOT_FIELDS * most)
        self.prefixes = numbers(PREFIX_FIELDS * self._room.num_prefixes)
        self.tables = numbers(most, _WIDTH)
        self.items = numbers(self._room.num_items, ITEM_FIELDS)
        self.merges = numbers(most, MERGE_FIELDS)

    def plan(self, batch, size):
        """The plan of a batch that is padded to ``size``."""
        room = self._attention.decode_room(size, _WIDTH, window=None)
        plan = decode_plan(
            room,
            window=None,
            slots=self.slots,
            prefixes=self.prefixes,
            tables=self.tables,
            items=self.items,
            merges=self.merges,
        )
        lens, tables = batch.tables["context_lens"], batch.tables["block_tables"]
        step = self._attention.decode_step(lens, tables, window=None, room=room)
        slots, prefixes = self.slots.cpu().numpy(), self.prefixes.cpu().numpy()
        fill_decode(step, room, slots, prefixes)
        self.slots.copy_(torch.from_numpy(slots))
        self.prefixes.copy_(torch.from_numpy(prefixes))
        self.tables[: len(lens), : tables.shape[1]] = torch.from_numpy(tables).to(
            plan.tables.device
        )
        self._attention.split(plan)
        return plan


@pytest.mark.parametrize(
    ("shapes", "shared", "size"),
    [(_SHARING, _SHARED, 7), ([(1, 30), (1, 700)], (), 4), ([(1, 65)], (), 1), (_SHARING, (), 5)],
)
def test_batches_of_all_sizes_run_in_one_memory_and_what_pads_them_gets_zeros(
    device, shapes, shared, size
):
    batch = make_batch(shapes, heads=(4, 1), head_dim=16, shared=shared)
    attention = batch.attention(device)
    plan = _Plans(attention, 7, device).plan(batch, size)
    count = len(shapes)
    query = torch.full((size, 4, 16), torch.nan)
    query[:count] = batch.query
    output = attention.run(plan, query.to(device), batch.pool.layer.to(device), batch.scale).cpu()
    batch.assert_expected(output[:count])
    assert not output[count:].any()


def test_what_was_recorded_over_one_batch_attends_for_the_next(device):
    batch = make_batch([(1, 30), (1, 700), (1, 65)], heads=(4, 1), head_dim=16)
    attention = batch.attention(device)
    plans = _Plans(attention, 4, device)
    layer, query = batch.pool.layer.to(device), torch.zeros(4, 4, 16, device=device)
    output = torch.zeros_like(query)
    plan = plans.plan(_some(batch, [1, 0]), 4)

    def attend():
        attention.split(plan)
        output.copy_(attention.run(plan, query, layer, batch.scale))

    recorder = CudaRecorder(device) if device.type == "cuda" else TapeRecorder()
    replay = recorder.record(attend)
    for sequences in ([2, 0, 1], [1]):
        part = _some(batch, sequences)
        plans.plan(part, 4)
        query[: len(sequences)] = part.query.to(device)
        output.fill_(torch.nan)
        replay()
        part.assert_expected(output[: len(sequences)].cpu())
        assert not output[len(sequences) :].any()


def _some(batch, sequences):
    """The same batch with some of its sequences, in that order."""
    tables = {
        "query_start": np.arange(len(sequences) + 1, dtype=np.int32),
        "context_lens": batch.tables["context_lens"][sequences],
        "block_tables": batch.tables["block_tables"][sequences],
    }
    return replace(batch, query=batch.query[sequences], tables=tables)


def test_what_an_earlier_batch_shared_is_not_shared_any_more(device):
    batch = make_batch(_SHARING, heads=(4, 1), head_dim=16, shared=_SHARED)
    attention = batch.attention(device)
    plans = _Plans(attention, 7, device)
    assert plans.plan(batch, 5).prefixes.any()
    alone = make_batch(_SHARING[:2], heads=(4, 1), head_dim=16)
    assert not plans.plan(alone, 2).prefixes.any()
    assert not plans.plan(alone, 5).prefixes.any()


def test_a_slot_of_no_token_writes_nothing(device):
    """Room that a refilled plan has left over does not touch the first token."""
    batch = make_batch([(1, 40)], heads=(2, 1), head_dim=32)
    attention = batch.attention(device)
    room = attention.decode_room(4, _WIDTH, window=None)
    batch.assert_expected(
        batch.run(attention, attention.plan(**batch.tables, window=None, room=room))
    )


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_no_batch_needs_more_prefixes_than_there_is_room_for(group_size):
    seed = int(np.random.SeedSequence().entropy % 2**31)
    print(f"seed={seed}")
    random = np.random.default_rng(seed)
    planner = StepPlanner(
        block_size=16, group_size=group_size, num_kv_heads=2, tiles=TILES, is_deterministic=False
    )
    most = []
    for _ in range(60):
        count = int(random.integers(1, 40))
        num_groups = int(random.integers(1, count + 1))
        # Sequences of one group begin with the same blocks, each with so many of them.
        group_of = random.integers(0, num_groups, count)
        depths = random.integers(1, 400, num_groups)[group_of]
        tables = np.arange(count * 420, dtype=np.int32).reshape(count, 420) + 10**6
        for sequence, (group, depth) in enumerate(zip(group_of, depths, strict=True)):
            tables[sequence, :depth] = np.arange(depth) + group * 1000
        lens = (depths * 16 + random.integers(1, 200, count)).astype(np.int32)
        step = planner.step(
            query_start=np.arange(count + 1, dtype=np.int32),
            context_lens=lens,
            block_tables=tables,
            window=None,
        )
        num_prefixes, num_partials = planner.prefix_bounds(count)
        assert step.prefixes.shape[0] <= num_prefixes
        assert step.num_shared_partials <= num_partials
        most.append(step.prefixes.shape[0])
    assert max(most) > 3


def test_one_sequence_and_a_deterministic_plan_have_no_room_for_prefixes(device):
    batch = make_batch([(1, 1100)], heads=(2, 1), head_dim=32)
    assert batch.attention(device).decode_room(1, 9, window=None).num_prefixes == 0
    assert batch.attention(device).decode_room(8, 9, window=64).num_prefixes == 0
    exact = batch.attention(device, is_deterministic=True)
    room = exact.decode_room(3, _WIDTH, window=None)
    # 120 blocks of 16 are 3.75 parts of 512.
    assert (room.num_prefixes, room.num_items) == (0, 12)
    lens, tables = batch.tables["context_lens"], batch.tables["block_tables"]
    small = exact.decode_room(3, 70, window=None)
    with pytest.raises(ValueError, match="table_width of this step is 71, with room for 70"):
        exact.decode_step(lens, tables[:, :71], window=None, room=small)
