"""Where a model meets KV memory: per step the batch's tables, per layer one call."""

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.executor.batch import StepBatch
from pageframe.executor.model.arena import KvArena
from pageframe.kernels.ops.kv_write import kv_write
from pageframe.kernels.ops.paged_attention import AttentionPlan, PagedAttention


class PagedKv:
    """The arena and the attention plans of the current step.

    Models see block tables only through ``attend``; nothing else reads or writes keys and values.
    """

    def __init__(self, arena: KvArena) -> None:
        self._arena = arena
        self._block_size = arena.layout.block_size
        self._dtype = arena.blocks.dtype
        self._device = arena.blocks.device
        self._layers = [arena.layer(index) for index in range(arena.layout.num_layers)]
        self._attention = PagedAttention(self._block_size, self._dtype, self._device)
        self._batch: StepBatch | None = None
        self._plans: dict[int | None, AttentionPlan] = {}
        self._block_ids = self._offsets = torch.empty(0, dtype=torch.int64)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._block_size

    def begin_step(self, batch: StepBatch) -> None:
        """Copy the blocks that the step asks for, and take its tables for the layers to come."""
        if batch.copy_sources.size:
            self._arena.copy(
                self._to_device(batch.copy_sources), self._to_device(batch.copy_targets)
            )
        slots = self._to_device(batch.slots)
        self._block_ids = slots // self._block_size
        self._offsets = slots % self._block_size
        self._plans.clear()
        self._batch = batch

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Write the new tokens' keys and values, then attend through the block tables.

        Args:
            layer_index: Which layer of the arena.
            query: shape (T, num_heads, head_dim).
            keys: shape (T, num_kv_heads, head_dim), position already encoded.
            values: shape (T, num_kv_heads, head_dim).
            scale: Multiplies scores.
            window: Positions that a token sees, itself included; None for all.

        Returns:
            shape (T, num_heads, head_dim), dtype of ``query``; valid until the next call.
        """
        layer = self._layers[layer_index]
        kv_write(keys, values, layer, self._block_ids, self._offsets)
        mixed = self._attention.run(self._plan(window), query.to(self._dtype), layer, scale)
        return mixed.to(query.dtype)

    def _plan(self, window: int | None) -> AttentionPlan:
        plan = self._plans.get(window)
        if plan is None:
            assert self._batch is not None, "attention outside a step"
            plan = self._attention.plan(
                query_start=self._batch.query_start,
                context_lens=self._batch.context_lens,
                block_tables=self._batch.block_tables,
                window=window,
            )
            self._plans[window] = plan
        return plan

    def _to_device(self, array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
