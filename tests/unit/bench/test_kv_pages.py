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


@pytest.mark.parametrize("pages", PAGES)
def test_one_layer_of_the_named_blocks_is_read_and_nothing_else(limits, pages):
    blocks = pool_memory(5 * _NUM_LAYERS * _PIECE_BYTES, pages).view(5, -1)
    # Sums that no other choice of pieces has, and small enough to be exact in float32.
    pieces = blocks.view(torch.float32).view(5, _NUM_LAYERS, -1)
    for block_id, layer in np.ndindex(5, _NUM_LAYERS):
        place = (block_id * 83 + layer * 31) % 384
        pieces[block_id, layer, place] = 8.0**block_id + 40_000 * (layer + 1)
    read = limits.reading(blocks, np.array([[4, 0], [1, 4]], dtype=np.int32), _PIECE_BYTES)
    for layer in range(_NUM_LAYERS):
        assert read(layer) == 4096 + 1 + 8 + 4096 + 4 * 40_000 * (layer + 1)


def test_pieces_that_the_reader_cannot_take_are_refused(limits):
    with pytest.raises(AssertionError, match="1000 bytes"):
        limits.reading(pool_memory(8000, "small").view(2, -1), np.array([0]), 1000)
