"""Writing slots and copying blocks change exactly what they name, byte for byte."""

import pytest
import torch

from pageframe.kernels.ops.copy_blocks import copy_blocks
from pageframe.kernels.ops.kv_gather import KvGather
from pageframe.kernels.ops.kv_write import kv_write
from pageframe.kernels.reference.copy_blocks import copy_blocks as copy_blocks_plainly
from pageframe.kernels.reference.kv_write import kv_write as kv_write_plainly
from unit.kernels.pools import FLOATS, QUANTISED, garbage_pool, random_pool

_ALL = pytest.mark.parametrize("dtype", FLOATS + QUANTISED)


@_ALL
@pytest.mark.parametrize("block_size", [1, 4, 16, 128])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_kv_write_equals_reference_in_every_byte(dtype, block_size, source):
    pool = random_pool(7, block_size, 2, 5, dtype)
    expected = pool.clone()
    slots = torch.randperm(7 * block_size, generator=torch.Generator().manual_seed(2))[:6]
    # Strided sources, as a slice of a fused projection is.
    fused = torch.randn(6, 9, 5, generator=torch.Generator().manual_seed(3)).to(source)
    keys, values = fused[:, 4:6], fused[:, 6:8]
    blocks, offsets = slots // block_size, slots % block_size
    kv_write(keys, values, pool.layer, blocks, offsets, kv_scales=pool.scales)
    kv_write_plainly(keys, values, expected.layer, blocks, offsets, kv_scales=expected.scales)
    assert torch.equal(pool.rows, expected.rows)


@_ALL
def test_kv_write_of_nothing_changes_nothing(dtype):
    pool = random_pool(2, 4, 2, 5, dtype)
    before = pool.clone()
    none, ids = torch.zeros(0, 2, 5), torch.zeros(0, dtype=torch.int64)
    kv_write(none, none, pool.layer, ids, ids, kv_scales=pool.scales)
    assert torch.equal(pool.rows, before.rows)


def test_kv_write_refuses_wrong_shapes():
    pool, ids = garbage_pool(7, 4, 2, 5, torch.float32), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="must both be"):
        kv_write(torch.zeros(3, 2, 5), torch.zeros(3, 2, 5), pool.layer, ids, ids)
    with pytest.raises(ValueError, match="offsets"):
        kv_write(torch.zeros(2, 2, 5), torch.zeros(2, 2, 5), pool.layer, ids, ids[:1])
    with pytest.raises(ValueError, match="layer has shape"):
        kv_write(torch.zeros(2, 2, 5), torch.zeros(2, 2, 5), pool.layer[0], ids, ids)


def test_kv_write_refuses_a_quantised_layer_without_scales_and_a_plain_one_with():
    ids, row = torch.tensor([0]), torch.zeros(1, 2, 5)
    pool = garbage_pool(2, 4, 2, 5, torch.int8)
    with pytest.raises(ValueError, match="no scales"):
        kv_write(row, row, pool.layer, ids, ids)
    plain = garbage_pool(2, 4, 2, 5, torch.float32)
    with pytest.raises(ValueError, match="scales for numbers"):
        kv_write(row, row, plain.layer, ids, ids, kv_scales=pool.scales)


@_ALL
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(
    ("sources", "targets"),
    [
        ([], []),
        ([3], [5]),
        # Block 2 is both target and source; 5 is copied twice.
        ([0, 2, 5, 5], [2, 3, 1, 6]),
        # The same chain told backwards, a swap, a ring of three, and a copy to itself.
        ([2, 0], [3, 2]),
        ([1, 4], [4, 1]),
        ([0, 1, 2], [1, 2, 0]),
        ([6, 6], [6, 2]),
    ],
)
def test_copy_blocks_equals_reference_in_every_byte(dtype, block_size, sources, targets):
    pool = random_pool(7, block_size, 2, 5, dtype)
    expected = pool.clone()
    copy_blocks(
        pool.rows,
        torch.tensor(sources, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
    )
    copy_blocks_plainly(
        expected.rows,
        torch.tensor(sources, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
    )
    assert torch.equal(pool.rows, expected.rows)


def test_random_copies_equal_the_reference():
    seed = int(torch.randint(2**31, ()).item())
    print(f"seed={seed}")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        pool = random_pool(9, 2, 1, 4, torch.int8, seed)
        expected = pool.clone()
        num_copies = int(torch.randint(1, 10, (), generator=generator).item())
        targets = torch.randperm(9, generator=generator)[:num_copies]
        sources = torch.randint(9, (num_copies,), generator=generator)
        copy_blocks(pool.rows, sources, targets)
        copy_blocks_plainly(expected.rows, sources, targets)
        assert torch.equal(pool.rows, expected.rows)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_scales_travel_with_their_block(dtype):
    pool = garbage_pool(5, 2, 1, 4, dtype)
    keys, values = torch.full((2, 1, 4), 3.0), torch.full((2, 1, 4), -50.0)
    block_ids, offsets = torch.tensor([1, 1]), torch.tensor([0, 1])
    kv_write(keys, values, pool.layer, block_ids, offsets, kv_scales=pool.scales)
    copy_blocks(pool.rows, torch.tensor([1]), torch.tensor([4]))
    gather = KvGather(torch.float32, torch.device("cpu"))
    for side, written in enumerate((keys, values)):
        read = gather.gather("read", pool.layer[:, side], pool.scales[:, side], torch.tensor([4]))
        torch.testing.assert_close(read, written, rtol=1e-6, atol=0)


def test_copy_blocks_refuses_unpaired_lists():
    pool = garbage_pool(3, 4, 2, 5, torch.float32)
    with pytest.raises(ValueError, match="2 sources for 1 targets"):
        copy_blocks(pool.rows, torch.tensor([0, 1]), torch.tensor([2]))
