"""Pools for tests: rows of bytes as an arena has them, every byte of them garbage."""

from dataclasses import dataclass

import torch

from pageframe.kernels.layouts import QUANTISED_DTYPES, SCALE_DTYPE, KvLayout

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
QUANTISED = (torch.int8, torch.float8_e4m3fn)
_MIDDLE = 1


@dataclass(frozen=True, slots=True)
class Pool:
    """Three layers; tests use the one in the middle, so that a wrong stride hits a neighbour."""

    layout: KvLayout
    rows: torch.Tensor

    @property
    def layer(self) -> torch.Tensor:
        """Payload view of the middle layer."""
        num_bytes = self.layout.num_elements_per_block * self.layout.dtype.itemsize
        payload = self.rows[:, :num_bytes].view(self.layout.dtype)
        return payload.view(-1, *self.layout.block_shape)[:, _MIDDLE]

    @property
    def scales(self) -> torch.Tensor | None:
        """Scale view of the middle layer."""
        if not self.layout.is_quantised:
            return None
        start = self.layout.payload_bytes_per_block
        scales = self.rows[:, start : start + self.layout.scale_bytes_per_block].view(SCALE_DTYPE)
        return scales.view(-1, *self.layout.block_shape[:-1])[:, _MIDDLE]

    def clone(self) -> "Pool":
        """A pool of the same bytes."""
        return Pool(self.layout, self.rows.clone())


def garbage_pool(num_blocks, block_size, num_kv_heads, head_dim, dtype):
    """Bytes of 0xff: NaN in every floating type, fp8 and scales included; -1 in int8."""
    layout = KvLayout(
        num_layers=3,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        is_quantised=dtype in QUANTISED_DTYPES,
    )
    return Pool(layout, torch.full((num_blocks, layout.block_bytes), 255, dtype=torch.uint8))


def random_pool(num_blocks, block_size, num_kv_heads, head_dim, dtype, seed=0):
    """Random bytes, whatever they mean."""
    pool = garbage_pool(num_blocks, block_size, num_kv_heads, head_dim, dtype)
    pool.rows.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return pool
