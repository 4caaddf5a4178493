"""The layout of KV memory, named once.

All blocks of a pool lie in one arena of bytes, one row per block, and a row holds everything
that its block knows: a copy on write, a swap or a demotion of a block is one large move.

    arena   uint8 [num_blocks, block_bytes]

    one block    │ payload: keys and values of all layers │ scales, if quantised │ padding │
                 0                      payload_bytes_per_block            to a multiple of 64

    payload  [num_layers, 2, block_size, num_kv_heads, head_dim]   of ``dtype``
    scales   [num_layers, 2, block_size, num_kv_heads]             of ``SCALE_DTYPE``
              layer ──▶ keys = 0, values = 1 ──▶ token ──▶ head ──▶ channel

What one attention layer sees are views over all blocks with the layer taken out, so its blocks
are *not* adjacent in memory; operations read strides from the tensor and assume none:

    layer   [num_blocks, 2, block_size, num_kv_heads, head_dim]
    scales  [num_blocks, 2, block_size, num_kv_heads], or None

Words used by every operation:

    block table   physical block of each logical block of one sequence
    slot          ``block_id * block_size + offset``: where one token's keys and values lie
    scale         what the stored numbers of one token and head are multiplied by to get them back
"""

from dataclasses import dataclass

import torch

# Keys and values of a 135M model (head_dim 64) through int8 and back: relative error 1.1036 % and
# 0.6716 % whether scales are float32 or float16. Two bytes fewer of 68 are not worth float16's
# range, in which the scale of a small row becomes zero.
SCALE_DTYPE = torch.float32
_SCALE_BYTES = int(SCALE_DTYPE.itemsize)
# Payload types that mean nothing without a scale.
QUANTISED_DTYPES = frozenset({torch.int8, torch.float8_e4m3fn})
# Vector loads and cache lines: no block shares a line with another.
_BLOCK_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Sizes of the KV memory of one model.

    Attributes:
        num_layers: Layers that keep keys and values.
        block_size: Tokens per block.
        num_kv_heads: Heads of keys and values per token.
        head_dim: Channels per head, the same for keys and values.
        dtype: Element type of the payload.
        is_quantised: Whether each token and head has a scale, one for keys and one for values;
            so exactly with the types in ``QUANTISED_DTYPES``.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    is_quantised: bool = False

    def __post_init__(self) -> None:
        """A payload has scales where it needs them and nowhere else."""
        assert self.is_quantised == (self.dtype in QUANTISED_DTYPES), (
            f"a layout of {self.dtype} with is_quantised={self.is_quantised}"
        )

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one block's payload over all layers."""
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def num_elements_per_token(self) -> int:
        """Numbers kept for one token: keys and values of all heads over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes kept for one token, its scales included; a block may add padding."""
        num_bytes = self.num_elements_per_token * int(self.dtype.itemsize)
        if self.is_quantised:
            num_bytes += self.num_layers * 2 * self.num_kv_heads * _SCALE_BYTES
        return num_bytes

    @property
    def num_elements_per_block(self) -> int:
        """Numbers kept for one block."""
        return self.num_elements_per_token * self.block_size

    @property
    def payload_bytes_per_block(self) -> int:
        """Bytes of a block's keys and values; scales begin here, so it is a multiple of theirs."""
        num_bytes = self.num_elements_per_block * int(self.dtype.itemsize)
        return _round_up(num_bytes, _SCALE_BYTES) if self.is_quantised else num_bytes

    @property
    def scale_bytes_per_block(self) -> int:
        """Bytes of a block's scales; 0 if it has none."""
        if not self.is_quantised:
            return 0
        return self.num_layers * 2 * self.block_size * self.num_kv_heads * _SCALE_BYTES

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's row: payload, scales and padding to a multiple of 64."""
        return _round_up(
            self.payload_bytes_per_block + self.scale_bytes_per_block, _BLOCK_ALIGNMENT_BYTES
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
