"""Sizes of a block, in literal bytes."""

import pytest
import torch

from pageframe.kernels.layouts import KvLayout


def _layout(dtype, is_quantised=False, **sizes):
    shape = {"num_layers": 3, "block_size": 4, "num_kv_heads": 2, "head_dim": 8} | sizes
    return KvLayout(dtype=dtype, is_quantised=is_quantised, **shape)


@pytest.mark.parametrize(("dtype", "num_bytes"), [(torch.float32, 1536), (torch.bfloat16, 768)])
def test_plain_block_is_its_payload(dtype, num_bytes):
    layout = _layout(dtype)
    assert layout.block_shape == (3, 2, 4, 2, 8)
    assert layout.payload_bytes_per_block == num_bytes
    assert (layout.scale_bytes_per_block, layout.block_bytes) == (0, num_bytes)
    assert layout.kv_bytes_per_token == num_bytes // 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_follow_the_payload_and_count_for_each_token(dtype):
    layout = _layout(dtype, is_quantised=True)
    assert (layout.payload_bytes_per_block, layout.scale_bytes_per_block) == (384, 192)
    assert layout.block_bytes == 576
    assert layout.kv_bytes_per_token == 96 + 48


def test_scales_are_aligned_and_blocks_start_on_cache_lines():
    layout = _layout(torch.int8, True, num_layers=1, block_size=1, num_kv_heads=1, head_dim=5)
    # Ten bytes of payload: two more until a scale may begin.
    assert (layout.payload_bytes_per_block, layout.scale_bytes_per_block) == (12, 8)
    assert layout.block_bytes == 64
    assert layout.kv_bytes_per_token == 10 + 8
    assert _layout(torch.float16, num_layers=1, head_dim=5).block_bytes == 192


@pytest.mark.parametrize(("dtype", "is_quantised"), [(torch.int8, False), (torch.float32, True)])
def test_scales_without_need_or_need_without_scales_is_our_bug(dtype, is_quantised):
    with pytest.raises(AssertionError, match="a layout of"):
        _layout(dtype, is_quantised)
