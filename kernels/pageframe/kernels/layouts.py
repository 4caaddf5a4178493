"""The layout of KV memory, named once.

All blocks of a pool lie in one arena, a tensor of six dimensions:

    arena   [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]
             block ────▶ layer ────▶ keys = 0, values = 1 ────▶ token ──▶ head ──▶ channel

    one block    │ layer 0 keys │ layer 0 values │ layer 1 keys │ ... │ layer N-1 values │
                 └─ contiguous: a copy on write or a swap of a block is one large move ──┘

What one attention layer sees is a view with the layer taken out, so its blocks are *not*
adjacent in memory; operations read strides from the tensor and assume none:

    layer   [num_blocks, 2, block_size, num_kv_heads, head_dim]

Words used by every operation:

    block table   physical block of each logical block of one sequence
    slot          ``block_id * block_size + offset``: where one token's keys and values lie
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Sizes of the KV memory of one model.

    Attributes:
        num_layers: Layers that keep keys and values.
        block_size: Tokens per block.
        num_kv_heads: Heads of keys and values per token.
        head_dim: Channels per head, the same for keys and values.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one block over all layers."""
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def num_elements_per_token(self) -> int:
        """Numbers kept for one token: keys and values of all heads over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim

    @property
    def num_elements_per_block(self) -> int:
        """Numbers kept for one block."""
        return self.num_elements_per_token * self.block_size
