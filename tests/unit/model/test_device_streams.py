"""Copies beside steps on a real GPU: bytes go out and come back while the device computes."""

import numpy as np
import pytest
import torch

from pageframe.executor.model.host_arena import HostArena
from pageframe.kernels.layouts import KvLayout

pytestmark = pytest.mark.gpu


def _ids(*values):
    return np.array(values, np.int64)


def _busy(device):
    """Some milliseconds of work on the current stream."""
    matrix = torch.ones(4096, 4096, device=device)
    for _ in range(8):
        matrix = matrix @ matrix * 1e-4
    return matrix


@pytest.mark.parametrize("settles", [True, False])
def test_blocks_leave_are_overwritten_and_come_back_elsewhere(settles):
    if not torch.cuda.is_available():
        pytest.skip("NO CUDA DEVICE HERE: copies were not tested on one")
    device = torch.device("cuda")
    layout = KvLayout(num_layers=4, block_size=16, num_kv_heads=2, head_dim=64, dtype=torch.float16)
    num_blocks, num_slots = 600, 500
    blocks = torch.randint(
        0, 256, (num_blocks, layout.block_bytes), dtype=torch.uint8, device=device
    )
    before = blocks.cpu()
    host = HostArena(num_slots, layout.block_bytes, device)
    order = np.random.default_rng(7)
    for _ in range(5):
        blocks.copy_(before)
        sources = order.permutation(num_blocks)[:num_slots]
        slots, targets = order.permutation(num_slots), order.permutation(num_blocks)[:num_slots]
        _busy(device)
        host.store(blocks, sources, slots)
        blocks.fill_(0xA5)
        _busy(device)
        host.load(blocks, slots, targets, settles=settles)
        _busy(device)
        host.settle()
        expected = torch.full_like(before, 0xA5)
        expected[torch.from_numpy(targets)] = before[torch.from_numpy(sources)]
        assert torch.equal(blocks.cpu(), expected)
        assert host.read(int(slots[3])) == bytes(before[int(sources[3])].numpy().data)
