"""Writing slots and copying blocks change exactly what they name."""

import pytest
import torch

from pageframe.kernels.ops.copy_blocks import copy_blocks
from pageframe.kernels.ops.kv_write import kv_write
from pageframe.kernels.reference.copy_blocks import copy_blocks as copy_blocks_plainly
from pageframe.kernels.reference.kv_write import kv_write as kv_write_plainly


def _arena(block_size, dtype=torch.float32):
    return torch.randn(7, 3, 2, block_size, 2, 5, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_write_equals_reference_in_every_byte(block_size, dtype):
    arena = _arena(block_size, dtype)
    expected = arena.clone()
    slots = torch.randperm(7 * block_size, generator=torch.Generator().manual_seed(2))[:6]
    # Strided sources, as a slice of a fused projection is.
    fused = torch.randn(6, 9, 5).to(dtype)
    keys, values = fused[:, 4:6], fused[:, 6:8]
    kv_write(keys, values, arena[:, 1], slots // block_size, slots % block_size)
    kv_write_plainly(keys, values, expected[:, 1], slots // block_size, slots % block_size)
    assert torch.equal(arena, expected)


def test_kv_write_refuses_wrong_shapes():
    arena, ids = _arena(4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="must both be"):
        kv_write(torch.zeros(3, 2, 5), torch.zeros(3, 2, 5), arena[:, 0], ids, ids)
    with pytest.raises(ValueError, match="offsets"):
        kv_write(torch.zeros(2, 2, 5), torch.zeros(2, 2, 5), arena[:, 0], ids, ids[:1])
    with pytest.raises(ValueError, match="layer has shape"):
        kv_write(torch.zeros(2, 2, 5), torch.zeros(2, 2, 5), arena, ids, ids)


def test_copy_blocks_equals_reference_also_in_a_chain():
    arena = _arena(4)
    expected = arena.clone()
    # Block 2 is both target and source; 5 is copied twice.
    sources, targets = torch.tensor([0, 2, 5, 5]), torch.tensor([2, 3, 1, 6])
    copy_blocks(arena, sources, targets)
    copy_blocks_plainly(expected, sources, targets)
    assert torch.equal(arena, expected)


def test_copy_blocks_refuses_unpaired_lists():
    with pytest.raises(ValueError, match="2 sources for 1 targets"):
        copy_blocks(_arena(4), torch.tensor([0, 1]), torch.tensor([2]))
