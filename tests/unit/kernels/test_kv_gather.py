"""Gathering: the named blocks in their order, as numbers."""

import pytest
import torch

from pageframe.kernels.ops.kv_gather import KvGather
from pageframe.kernels.ops.kv_write import kv_write
from pageframe.kernels.reference.kv_gather import kv_gather
from unit.kernels.pools import FLOATS, QUANTISED, garbage_pool

_CPU = torch.device("cpu")
# The last step into the type of the computation rounds once.
_TOLERANCE = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def _filled_pool(block_size, dtype, num_blocks=6, num_kv_heads=3, head_dim=5):
    pool = garbage_pool(num_blocks, block_size, num_kv_heads, head_dim, dtype)
    generator = torch.Generator().manual_seed(block_size)
    num_tokens = num_blocks * block_size
    slots = torch.arange(num_tokens)
    keys, values = torch.randn(2, num_tokens, num_kv_heads, head_dim, generator=generator)
    blocks, offsets = slots // block_size, slots % block_size
    kv_write(keys, values, pool.layer, blocks, offsets, kv_scales=pool.scales)
    return pool


@pytest.mark.parametrize("stored", FLOATS + QUANTISED)
@pytest.mark.parametrize("computed", FLOATS)
@pytest.mark.parametrize("block_size", [1, 4, 128])
def test_equals_reference(stored, computed, block_size):
    pool = _filled_pool(block_size, stored)
    gather = KvGather(computed, _CPU)
    for side in (0, 1):
        scales = None if pool.scales is None else pool.scales[:, side]
        # Once more with fewer blocks, so that scratch holds something older.
        for blocks in ([4, 0, 5, 0], [3]):
            block_ids = torch.tensor(blocks)
            actual = gather.gather("keys", pool.layer[:, side], scales, block_ids)
            expected = kv_gather(pool.layer[:, side], scales, block_ids)
            assert (actual.dtype, actual.is_contiguous()) == (computed, True)
            torch.testing.assert_close(
                actual.double(), expected, rtol=_TOLERANCE[computed], atol=2**-24
            )


def test_every_fp8_number_is_read_as_torch_reads_it():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    side = codes.view(torch.float8_e4m3fn).view(1, -1, 1, 1)
    scales = torch.ones(side.shape[:-1])
    actual = KvGather(torch.float32, _CPU).gather("all", side, scales, torch.tensor([0]))
    assert codes.numel() == 254
    assert torch.equal(actual.flatten(), side.flatten().float())


@pytest.mark.parametrize("dtype", QUANTISED)
def test_two_names_live_at_once(dtype):
    pool = _filled_pool(2, dtype)
    gather = KvGather(torch.float32, _CPU)
    sides = [
        gather.gather(name, pool.layer[:, side], pool.scales[:, side], torch.tensor([1, 2]))
        for side, name in enumerate(("keys", "values"))
    ]
    for side, actual in enumerate(sides):
        expected = kv_gather(pool.layer[:, side], pool.scales[:, side], torch.tensor([1, 2]))
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-7)


def test_refuses_scales_of_other_numbers():
    pool = _filled_pool(2, torch.int8)
    gather = KvGather(torch.float32, _CPU)
    with pytest.raises(ValueError, match="no scales"):
        gather.gather("keys", pool.layer[:, 0], None, torch.tensor([0]))
    with pytest.raises(ValueError, match="do not fit"):
        gather.gather("keys", pool.layer[:, 0], pool.scales, torch.tensor([0]))
