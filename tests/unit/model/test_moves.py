"""Runners move whole blocks in one order, whatever the blocks hold: out, copy, in."""

import numpy as np
import pytest
import torch

from pageframe.core.errors import (
    InternalError,
    InvalidRequestError,
    OutOfRangeError,
    ResourceExhaustedError,
)
from pageframe.executor.batch import ModelFacts
from pageframe.executor.block_moves import BlockMoves
from pageframe.executor.model import arena as arena_module
from pageframe.executor.model.decoder import KvShape
from pageframe.executor.model.host_memory import HEADROOM_BYTES
from pageframe.executor.model.runner import PagedRunner
from pageframe.executor.model.sim import SimConfig, SimRunner

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
_KINDS = ["sim", *_DTYPES]
_BLOCK_SIZE = 4
_NUM_SLOTS = 3


class _Shape:
    """The part of a decoder that a pool needs; nothing is computed here."""

    reads_batch = False
    kv_shape = KvShape(num_layers=3, num_kv_heads=2, head_dim=8)


def _paged_runner(dtype):
    facts = ModelFacts(
        name="shape",
        folder="",
        vocab_size=8,
        max_model_len=64,
        eos_token_ids=(),
        kv_bytes_per_token=1,
        device="cpu",
        dtype="float32",
        kv_dtype=str(dtype).removeprefix("torch."),
        runner="native",
    )
    return PagedRunner(_Shape(), facts, None, torch.device("cpu"), dtype, max_step_tokens=64)


def _runner(kind):
    return SimRunner(SimConfig()) if kind == "sim" else _paged_runner(_DTYPES[kind])


def _contents(runner, num_blocks):
    return [runner.read_block(block_id) for block_id in range(num_blocks)]


@pytest.fixture(params=_KINDS)
def filled(request):
    """A runner with 6 of 8 blocks and 3 slots, and the bytes of each: all different."""
    runner = _runner(request.param)
    runner.allocate_pool(6, _BLOCK_SIZE, num_blocks_max=8, num_host_slots=_NUM_SLOTS)
    rng = np.random.default_rng(5)
    blocks = [rng.bytes(runner.block_bytes) for _ in range(6)]
    slots = [rng.bytes(runner.block_bytes) for _ in range(_NUM_SLOTS)]
    for block_id, data in enumerate(blocks):
        runner.write_block(block_id, data)
    for slot, data in enumerate(slots):
        runner.write_host(slot, data)
    return runner, blocks, slots


def _moves(*, out=(), copy=(), into=()):
    """Pairs of source and target."""
    arrays = {}
    for pairs, sources, targets in (
        (out, "out_sources", "out_slots"),
        (copy, "copy_sources", "copy_targets"),
        (into, "in_slots", "in_targets"),
    ):
        arrays[sources] = np.array([source for source, _ in pairs], np.int64)
        arrays[targets] = np.array([target for _, target in pairs], np.int64)
    return BlockMoves(**arrays)


def _host(runner):
    return [runner.read_host(slot) for slot in range(_NUM_SLOTS)]


def test_a_block_that_one_move_frees_is_used_by_the_next(filled):
    runner, blocks, slots = filled
    # Block 3 is demoted, becomes the copy of block 5, and slot 1 is promoted into block 5.
    moves = _moves(out=[(3, 0)], copy=[(5, 3)], into=[(1, 5)])
    assert len(moves) == 3
    runner.move_blocks(moves)
    assert _contents(runner, 6) == [*blocks[:3], blocks[5], blocks[4], slots[1]]
    assert _host(runner) == [blocks[3], slots[1], slots[2]]


def test_a_slot_that_was_just_stored_to_comes_in_with_its_new_content(filled):
    runner, blocks, slots = filled
    runner.move_blocks(_moves(out=[(4, 2)], copy=[(0, 4)], into=[(2, 1), (2, 0)]))
    assert _contents(runner, 6) == [blocks[4], blocks[4], *blocks[2:4], blocks[0], blocks[5]]
    assert _host(runner) == [slots[0], slots[1], blocks[4]]


def test_all_sources_are_read_before_any_target_is_written(filled):
    runner, blocks, _ = filled
    runner.move_blocks(_moves(copy=[(0, 1), (1, 2), (2, 0), (3, 4), (4, 3), (5, 5)]))
    assert _contents(runner, 6) == [
        blocks[2],
        blocks[0],
        blocks[1],
        blocks[4],
        blocks[3],
        blocks[5],
    ]


def test_a_block_leaves_is_overwritten_and_comes_back_elsewhere(filled):
    runner, blocks, _ = filled
    runner.move_blocks(_moves(out=[(0, 1), (4, 2)]))
    for block_id in range(6):
        runner.write_block(block_id, bytes(runner.block_bytes))
    runner.move_blocks(_moves(into=[(2, 0), (1, 5)]))
    empty = bytes(runner.block_bytes)
    assert _contents(runner, 6) == [blocks[4], empty, empty, empty, empty, blocks[0]]


def test_no_moves_are_false_and_move_nothing(filled):
    runner, blocks, slots = filled
    moves = BlockMoves()
    assert not moves
    runner.move_blocks(moves)
    assert (_contents(runner, 6), _host(runner)) == (blocks, slots)


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        ({"out": [(6, 0)]}, r"\(out\): sources 6 to 6, but there are 6"),
        ({"out": [(0, 3)]}, r"\(out\): targets 3 to 3, but there are 3"),
        ({"out": [(0, 1), (1, 1)]}, r"\(out\): a target twice"),
        ({"copy": [(-1, 0)]}, r"\(copy\): sources -1 to -1, but there are 6"),
        ({"copy": [(0, 2), (0, 7)]}, r"\(copy\): targets 2 to 7, but there are 6"),
        ({"into": [(-1, 0)]}, r"\(in\): sources -1 to -1, but there are 3"),
        ({"into": [(0, -1)]}, r"\(in\): targets -1 to -1, but there are 6"),
        ({"into": [(0, 5), (1, 5)]}, r"\(in\): a target twice"),
    ],
)
def test_moves_to_nowhere_are_our_bug_and_move_nothing(filled, pairs, why):
    runner, blocks, slots = filled
    good = {"out": [(1, 2)], "copy": [(3, 4)], "into": [(0, 2)]}
    with pytest.raises(InternalError, match=why) as caught:
        runner.move_blocks(_moves(**(good | pairs)))
    assert caught.value.reason == "MOVE_INVALID"
    assert (_contents(runner, 6), _host(runner)) == (blocks, slots)


def test_sources_without_targets_are_our_bug():
    runner = _runner("sim")
    runner.allocate_pool(4, _BLOCK_SIZE)
    with pytest.raises(InternalError, match="2 sources for 0 targets"):
        runner.move_blocks(BlockMoves(copy_sources=np.array([0, 1])))


def test_a_pool_shrinks_and_grows_around_what_stays(filled):
    runner, blocks, slots = filled
    runner.resize_pool(2)
    assert (_contents(runner, 2), _host(runner)) == (blocks[:2], slots)
    with pytest.raises(OutOfRangeError, match="no block 2 in a pool of 2"):
        runner.read_block(2)
    with pytest.raises(InternalError, match="targets 2 to 2, but there are 2"):
        runner.move_blocks(_moves(into=[(0, 2)]))
    runner.resize_pool(8)
    runner.move_blocks(_moves(copy=[(1, 7)], into=[(2, 2)]))
    assert _contents(runner, 8)[:3] == [*blocks[:2], slots[2]]
    assert runner.read_block(7) == blocks[1]


def test_a_pool_stays_as_it_is_when_a_size_is_refused(filled):
    runner, blocks, _ = filled
    for num_blocks in (0, 9):
        with pytest.raises(OutOfRangeError) as caught:
            runner.resize_pool(num_blocks)
        assert caught.value.reason == "POOL_SIZE_OUT_OF_RANGE"
    assert _contents(runner, 6) == blocks


def test_blocks_and_slots_that_are_not_there_cannot_be_read_or_written(filled):
    runner, _, _ = filled
    data = bytes(runner.block_bytes)
    for call, reason in (
        (lambda: runner.read_block(6), "BLOCK_OUT_OF_RANGE"),
        (lambda: runner.write_block(-1, data), "BLOCK_OUT_OF_RANGE"),
        (lambda: runner.read_host(-1), "HOST_SLOT_OUT_OF_RANGE"),
        (lambda: runner.write_host(3, data), "HOST_SLOT_OUT_OF_RANGE"),
    ):
        with pytest.raises(OutOfRangeError) as caught:
            call()
        assert caught.value.reason == reason
    for write in (runner.write_block, runner.write_host):
        with pytest.raises(InvalidRequestError) as caught:
            write(0, data[:-1])
        assert caught.value.reason == "BLOCK_BYTES_INVALID"


@pytest.mark.parametrize("kind", _KINDS)
def test_bytes_are_those_of_the_layout(kind):
    runner = _runner(kind)
    runner.allocate_pool(2, _BLOCK_SIZE)
    # 3 layers x 2 x 4 tokens x 2 heads: 48 scales of 4 bytes, and 8 channels each.
    expected = {
        "sim": 4 * 8,
        "float32": 384 * 4,
        "bfloat16": 384 * 2,
        "float16": 384 * 2,
        "int8": 384 + 48 * 4,
        "fp8": 384 + 48 * 4,
    }
    assert runner.block_bytes == expected[kind]
    assert runner.read_block(1) == bytes(runner.block_bytes)


def test_pool_and_host_tier_must_fit_together(monkeypatch):
    block_bytes = 384 * 4
    monkeypatch.setattr(
        arena_module, "available_memory_bytes", lambda: HEADROOM_BYTES + 1000 * block_bytes
    )
    _runner("float32").allocate_pool(600, _BLOCK_SIZE, num_blocks_max=10**6, num_host_slots=400)
    with pytest.raises(ResourceExhaustedError) as caught:
        _runner("float32").allocate_pool(600, _BLOCK_SIZE, num_host_slots=401)
    assert caught.value.limits["promised_bytes"] == str(401 * block_bytes)


def test_a_pool_does_not_grow_into_what_the_host_tier_still_needs(monkeypatch):
    runner = _runner("float32")
    runner.allocate_pool(10, 256, num_blocks_max=40, num_host_slots=20)
    block_bytes = runner.block_bytes
    assert block_bytes == 24 * 4096
    for slot in range(5):
        runner.write_host(slot, bytes(block_bytes))
    monkeypatch.setattr(
        arena_module, "available_memory_bytes", lambda: HEADROOM_BYTES + 30 * block_bytes
    )
    with pytest.raises(ResourceExhaustedError) as caught:
        runner.resize_pool(16)
    assert caught.value.limits["promised_bytes"] == str(15 * block_bytes)
    runner.resize_pool(15)
