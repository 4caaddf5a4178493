"""A model's calls reach the pool in every type, and read nothing but what they may see."""

import numpy as np
import pytest
import torch

from pageframe.executor.batch import StepBatch
from pageframe.executor.model.arena import KvArena
from pageframe.executor.model.paged_kv import PagedKv, compute_dtype
from pageframe.kernels.layouts import QUANTISED_DTYPES, KvLayout
from pageframe.kernels.reference.paged_attention import paged_attention

_CPU = torch.device("cpu")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_QUANTISED = (torch.int8, torch.float8_e4m3fn)
_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 4, 2, 16
# Of the computation's type: the widest of the two, float32 with a quantised pool.
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_OUTSIDE = 2**31 - 1


def _layout(dtype, block_size=4):
    return KvLayout(
        num_layers=2,
        block_size=block_size,
        num_kv_heads=_NUM_KV_HEADS,
        head_dim=_HEAD_DIM,
        dtype=dtype,
        is_quantised=dtype in QUANTISED_DTYPES,
    )


def _garbage_arena(dtype, block_size=4, num_blocks=12):
    arena = KvArena(_layout(dtype, block_size), num_blocks, _CPU)
    arena.blocks.fill_(255)
    return arena


def _batch(entries, block_size):
    """``entries``: (new tokens, context length, block table) of each sequence."""
    positions = [np.arange(end - num_new, end) for num_new, end, _ in entries]
    tables = np.full((len(entries), 12), _OUTSIDE, np.int32)
    for index, (_, _, table) in enumerate(entries):
        tables[index, : len(table)] = table
    slots = [
        tables[index, span // block_size].astype(np.int64) * block_size + span % block_size
        for index, span in enumerate(positions)
    ]
    num_new = [entry[0] for entry in entries]
    no_samples = np.empty(0, np.int32)
    return StepBatch(
        step=1,
        num_decodes=num_new.count(1),
        rows=np.arange(len(entries), dtype=np.int32),
        token_ids=np.zeros(sum(num_new), np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        slots=np.concatenate(slots),
        query_start=np.cumsum([0, *num_new]).astype(np.int32),
        context_lens=np.array([end for _, end, _ in entries], np.int32),
        block_tables=tables,
        samples=no_samples,
        sample_rows=no_samples,
    )


class _Caller:
    """Draws a step's queries, keys and values, attends in layer 1, and asks the reference too."""

    def __init__(self, arena, dtype):
        self.arena = arena
        self.kv = PagedKv(arena)
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(1)

    def step(self, entries, window=None):
        batch = _batch(entries, self.arena.layout.block_size)
        num_tokens = len(batch.token_ids)
        query = self._draw(num_tokens, _NUM_HEADS)
        keys, values = self._draw(num_tokens, _NUM_KV_HEADS), self._draw(num_tokens, _NUM_KV_HEADS)
        self.kv.begin_step(batch)
        actual = self.kv.attend(1, query, keys, values, scale=0.25, window=window)
        expected = paged_attention(
            query,
            self.arena.layer(1),
            query_start=batch.query_start,
            context_lens=batch.context_lens,
            block_tables=batch.block_tables,
            scale=0.25,
            window=window,
            kv_scales=self.arena.scales(1),
        )
        assert expected.isfinite().all()
        assert actual.dtype == self._dtype
        return actual.clone(), expected

    def _draw(self, *shape):
        return torch.randn(*shape, _HEAD_DIM, generator=self._generator).to(self._dtype)


@pytest.mark.parametrize("stored", _FLOATS + _QUANTISED)
@pytest.mark.parametrize("computed", _FLOATS)
@pytest.mark.parametrize("window", [None, 3, 6])
def test_chunks_and_then_decodes_equal_the_reference(stored, computed, window):
    caller = _Caller(_garbage_arena(stored), computed)
    tolerance = _TOLERANCE[computed]
    for entries in (
        [(7, 7, [5, 2]), (5, 5, [9, 1])],
        [(1, 8, [5, 2]), (3, 8, [9, 1])],
        [(1, 9, [5, 2, 11]), (1, 9, [9, 1, 0])],
    ):
        actual, expected = caller.step(entries, window)
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("stored", _FLOATS + _QUANTISED)
def test_other_layers_and_other_slots_stay_as_they_are(stored):
    arena = _garbage_arena(stored, num_blocks=3)
    _Caller(arena, torch.float32).step([(5, 5, [2, 0])])
    layout = arena.layout
    untouched = torch.full((3, layout.block_bytes), 255, dtype=torch.uint8)
    assert torch.equal(arena.blocks[1], untouched[1])
    # Layer 0 lies in front of layer 1 in each block's payload.
    layer_bytes = layout.num_elements_per_block * layout.dtype.itemsize // layout.num_layers
    assert torch.equal(arena.blocks[:, :layer_bytes], untouched[:, :layer_bytes])
    # Token 4 is the first of block 0; the places behind it were never written.
    rest = arena.layer(1)[0, :, 1:]
    assert (rest.contiguous().view(torch.uint8) == 255).all()
    if arena.scales(1) is not None:
        assert arena.scales(0).isnan().all()
        assert arena.scales(1)[0, :, 1:].isnan().all()
        assert arena.scales(1)[0, :, 0].isfinite().all()


@pytest.mark.parametrize("stored", [torch.float32, *_QUANTISED])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_blocks_before_every_window_may_be_given_away(stored, block_size):
    arena = _garbage_arena(stored, block_size, num_blocks=24)
    caller = _Caller(arena, torch.float32)
    num_blocks = -(-11 // block_size)
    table = list(range(3, 3 + num_blocks))
    caller.step([(11, 11, table)], window=5)
    # The next token sees positions [7, 12): what holds older ones only, goes to somebody else.
    num_gone = 7 // block_size
    arena.blocks[3 : 3 + num_gone] = 255
    longer = [_OUTSIDE] * num_gone + table[num_gone:]
    if 11 // block_size == num_blocks:
        longer.append(20)
    actual, expected = caller.step([(1, 12, longer)], window=5)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)
    assert block_size == 16 or num_gone


@pytest.mark.parametrize(("stored", "tolerance"), [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.1)])
def test_quantised_pool_answers_nearly_as_a_float_one(stored, tolerance):
    """The same calls; steps of 1/127 and of 1/16 of a number, softened by the mean over keys."""
    exact, rough = (
        _Caller(_garbage_arena(dtype), torch.float32) for dtype in (torch.float32, stored)
    )
    for entries in ([(12, 12, [5, 2, 7])], [(1, 13, [5, 2, 7, 1])]):
        expected, _ = exact.step(entries)
        actual, _ = rough.step(entries)
        error = (actual - expected).abs().max()
        assert 1e-4 < error < tolerance


def test_pool_resized_under_a_model_is_the_same_pool():
    arena = KvArena(_layout(torch.int8), 4, _CPU, num_blocks_max=8)
    caller = _Caller(arena, torch.float32)
    caller.step([(4, 4, [2])])
    arena.resize(8)
    actual, expected = caller.step([(1, 5, [2, 7])])
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


def test_attention_outside_a_step_is_our_bug():
    kv = PagedKv(_garbage_arena(torch.float32))
    rows = torch.zeros(0, _NUM_KV_HEADS, _HEAD_DIM)
    with pytest.raises(AssertionError, match="outside a step"):
        kv.attend(0, torch.zeros(0, _NUM_HEADS, _HEAD_DIM), rows, rows, scale=1.0, window=None)


@pytest.mark.parametrize(
    ("query", "stored", "device", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, "cpu", torch.bfloat16),
        (torch.bfloat16, torch.float32, "cpu", torch.float32),
        (torch.float32, torch.bfloat16, "cpu", torch.float32),
        (torch.bfloat16, torch.float16, "cuda", torch.float32),
        (torch.bfloat16, torch.int8, "cpu", torch.float32),
        (torch.bfloat16, torch.int8, "cuda", torch.bfloat16),
        (torch.float16, torch.float8_e4m3fn, "cuda", torch.float16),
    ],
)
def test_attention_computes_in_the_wider_type(query, stored, device, expected):
    assert compute_dtype(query, _layout(stored), torch.device(device)) == expected
