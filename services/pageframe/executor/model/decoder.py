"""What the paged runner asks of a model: hidden states through paged attention, then logits."""

from dataclasses import dataclass
from typing import Protocol

import torch

from pageframe.executor.model.paged_kv import PagedKv


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """Keys and values that a model keeps per token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


class Decoder(Protocol):
    """A causal model whose attention reads and writes only through a ``PagedKv``.

    Attributes:
        kv_shape: Keys and values per token.
        reads_batch: Whether it takes tokens and positions from the batch of its ``PagedKv``, where
            they stand as compiled kernels want them; then ``forward`` is given none.
    """

    kv_shape: KvShape
    reads_batch: bool

    def forward(
        self,
        kv: PagedKv,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Run all layers over the step's new tokens.

        Args:
            kv: Tables of this step.
            token_ids: int64, shape (T,).
            positions: int64, shape (T,).
            rows: int64, shape (R,), tokens whose output is wanted.

        Returns:
            shape (R, ...), what ``logits`` takes, in any slices; valid until the next forward.
        """
        ...

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits of some rows of ``forward``'s result: float32, shape (R', vocab_size)."""
        ...
