"""What attention kernels are compiled for: sizes and strides of a model, and tiles of a chip."""

from dataclasses import dataclass
from typing import Any

import triton.language as tl


def padded_dim(head_dim: int) -> int:
    """Channels rounded up to a power of two, at least the 16 that a product needs of each half."""
    return max(32, 1 << (head_dim - 1).bit_length())


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Sizes that are constants of the compiled kernels; one model has one of these.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Heads of keys and values, a divisor of ``num_heads``.
        head_dim: Channels per head.
        block_size: Tokens per block.
        query_stride: Elements from a token's queries to the next token's.
        layer_strides: Elements from a block, side, token and head of a layer to the next.
        scale_strides: The same for scales; None if the layer has none.
        has_slopes: Whether scores fall with distance (ALiBi).
        dot_dtype: Type that products are taken in: "fp16", "bf16" or "fp32".
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    query_stride: int
    layer_strides: tuple[int, int, int, int]
    scale_strides: tuple[int, int, int, int] | None
    has_slopes: bool
    dot_dtype: str

    @property
    def group_size(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def padded_dim(self) -> int:
        """Channels rounded up to a power of two, at least what a product needs."""
        return padded_dim(self.head_dim)

    def constants(self, rows: int, keys: int) -> dict[str, Any]:
        """The constants of kernels that attend, in tiles of so many rows and keys.

        ``paged_prefill`` has WINDOW beside them.
        """
        block, side, token, head = self.layer_strides
        scale_block, scale_side, scale_token, scale_head = self.scale_strides or (0, 0, 0, 0)
        return {
            "GROUP": self.group_size,
            "NUM_KV_HEADS": self.num_kv_heads,
            "QUERY_STRIDE": self.query_stride,
            "ROWS": rows,
            "TILE": keys,
            "DIM": self.padded_dim,
            "HEAD_DIM": self.head_dim,
            "BLOCK_SIZE": self.block_size,
            "BLOCK_STRIDE": block,
            "SIDE_STRIDE": side,
            "TOKEN_STRIDE": token,
            "HEAD_STRIDE": head,
            "SCALE_BLOCK_STRIDE": scale_block,
            "SCALE_SIDE_STRIDE": scale_side,
            "SCALE_TOKEN_STRIDE": scale_token,
            "SCALE_HEAD_STRIDE": scale_head,
            "HAS_SCALES": self.scale_strides is not None,
            "HAS_SLOPES": self.has_slopes,
            "DOT": {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}[self.dot_dtype],
        }

    def merge_constants(self) -> dict[str, Any]:
        """The constants of ``merge_splits``."""
        return {
            "NUM_HEADS": self.num_heads,
            "PARTS": 8,
            "DIM": self.padded_dim,
            "HEAD_DIM": self.head_dim,
        }
