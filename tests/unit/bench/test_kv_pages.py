"""Reading a pool reads the layer and the blocks that it is told to, whatever its pages are."""

import numpy as np
import pytest
import torch

from bench.kv_pages import PAGES, KvLimits, pool_memory
from pageframe.kernels.cpu.library import load

_PIECE_BYTES = 1536
_NUM_LAYERS = 3


@pytest.fixture(scope="module")
def limits():
    return KvLimits(load(None))


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("pages", PAGES)
def test_one_layer_of_the_named_blocks_is_read_and_nothing_else(
    limits, monkeypatch, pages, num_threads
):
    monkeypatch.setattr(limits, "num_threads", num_threads)
    blocks = pool_memory(5 * _NUM_LAYERS * _PIECE_BYTES, pages).view(5, -1)
    # Sums that no other choice of pieces has, and small enough to be exact in float32.
    pieces = blocks.view(torch.float32).view(5, _NUM_LAYERS, -1)
    for block_id, layer in np.ndindex(5, _NUM_LAYERS):
        place = (block_id * 83 + layer * 31) % 384
        pieces[block_id, layer, place] = 8.0**block_id + 40_000 * (layer + 1)
    read = limits.reading(blocks, np.array([[4, 0], [1, 4]], dtype=np.int32), _PIECE_BYTES)
    for layer in range(_NUM_LAYERS):
        assert sum(read(layer).totals) == 4096 + 1 + 8 + 4096 + 4 * 40_000 * (layer + 1)


def test_threads_share_blocks_in_their_order(limits, monkeypatch):
    monkeypatch.setattr(limits, "num_threads", 2)
    blocks = pool_memory(4 * _PIECE_BYTES, "small").view(4, -1)
    blocks.view(torch.float32)[:, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    read = limits.reading(blocks, np.array([[3, 0], [1, 2]]), _PIECE_BYTES)
    assert read(0).totals == (8 + 1, 2 + 4)


def test_pieces_that_the_reader_cannot_take_are_refused(limits):
    with pytest.raises(AssertionError, match="1000 bytes"):
        limits.reading(pool_memory(8000, "small").view(2, -1), np.array([0]), 1000)(0)
