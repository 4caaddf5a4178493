"""Where a model meets KV memory: per step the batch's tables, per layer one call.

Blocks are moved between steps and before them, never here; see ``ModelRunner.move_blocks``.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.executor.batch import StepBatch
from pageframe.executor.model.arena import KvArena
from pageframe.kernels.layouts import KvLayout
from pageframe.kernels.ops.attention_plan import AttentionPlan
from pageframe.kernels.ops.kv_write import kv_write
from pageframe.kernels.ops.paged_attention import PagedAttention


class PagedKv:
    """The arena and the attention plans of the current step.

    Models see block tables only through ``attend``; nothing else reads or writes keys and values.
    """

    def __init__(self, arena: KvArena) -> None:
        layout = arena.layout
        self._layout = layout
        self._layers = [arena.layer(index) for index in range(layout.num_layers)]
        self._device = self._layers[0].device
        self._scales = [arena.scales(index) for index in range(layout.num_layers)]
        # Made by the first call, which knows the type of the model's activations.
        self._attention: PagedAttention | None = None
        self._batch: StepBatch | None = None
        self._plans: dict[int | None, AttentionPlan] = {}
        self._block_ids = self._offsets = torch.empty(0, dtype=torch.int64)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._layout.block_size

    def begin_step(self, batch: StepBatch) -> None:
        """Take the tables of a step for the layers to come."""
        slots = self._to_device(batch.slots)
        self._block_ids = slots // self._layout.block_size
        self._offsets = slots % self._layout.block_size
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
        layer, scales = self._layers[layer_index], self._scales[layer_index]
        kv_write(keys, values, layer, self._block_ids, self._offsets, kv_scales=scales)
        if self._attention is None:
            dtype = compute_dtype(query.dtype, self._layout, self._device)
            self._attention = PagedAttention(self._layout.block_size, dtype, self._device)
        mixed = self._attention.run(
            self._plan(self._attention, window),
            query.to(self._attention.dtype),
            layer,
            scale,
            kv_scales=scales,
        )
        return mixed.to(query.dtype)

    def _plan(self, attention: PagedAttention, window: int | None) -> AttentionPlan:
        plan = self._plans.get(window)
        if plan is None:
            assert self._batch is not None, "attention outside a step"
            plan = attention.plan(
                query_start=self._batch.query_start,
                context_lens=self._batch.context_lens,
                block_tables=self._batch.block_tables,
                window=window,
            )
            self._plans[window] = plan
        return plan

    def _to_device(self, array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def compute_dtype(query_dtype: torch.dtype, layout: KvLayout, device: torch.device) -> torch.dtype:
    """The type that attention computes in.

    The wider one of queries and pool. A quantised pool has none of its own: there it is the
    queries', but float32 on a CPU, where conversion to bfloat16 took twice as long (AVX2).
    """
    if not layout.is_quantised:
        return torch.promote_types(query_dtype, layout.dtype)
    return torch.float32 if device.type == "cpu" else query_dtype
