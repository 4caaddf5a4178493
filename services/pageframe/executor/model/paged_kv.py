"""Where a model meets KV memory: per step the batch's tables, per layer one call.

Blocks are moved between steps and before them, never here; see ``ModelRunner.move_blocks``.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.executor.batch import StepBatch
from pageframe.executor.model.arena import KvArena
from pageframe.executor.model.layer_groups import LayerGroups, one_group
from pageframe.kernels.layouts import KvLayout
from pageframe.kernels.ops.alibi import Alibi
from pageframe.kernels.ops.attention import Attention, choose_attention
from pageframe.kernels.ops.kv_write import kv_write


class Cells(NamedTuple):
    """Memory of one layer, and where the new tokens of a step go in it.

    Attributes:
        layer: shape (num_blocks, 2, block_size, num_kv_heads, head_dim), strided.
        scales: float32, shape (num_blocks, 2, block_size, num_kv_heads), or None.
        slots: int64, shape (T,), contiguous.
    """

    layer: torch.Tensor
    scales: torch.Tensor | None
    slots: torch.Tensor


class PagedKv:
    """The arena and the attention plans of the current step.

    Models see block tables only through ``attend``; nothing else reads or writes keys and values.
    The one exception is a decoder that does in one call what ``attend`` does layer by layer: it
    takes ``arena``, ``groups`` and ``batch`` as they are.

    Args:
        arena: Its blocks have room for the layers of one group.
        groups: Which layer is where in which group; all in one where absent.
        attention: Attends; chosen by the first call where absent.

    Attributes:
        arena: As above.
        groups: As above.
    """

    def __init__(
        self,
        arena: KvArena,
        groups: LayerGroups | None = None,
        attention: Attention | None = None,
    ) -> None:
        layout = arena.layout
        self.arena = arena
        self._layout = layout
        self._layers = [arena.layer(index) for index in range(layout.num_layers)]
        self._device = self._layers[0].device
        self._scales = [arena.scales(index) for index in range(layout.num_layers)]
        self.groups = groups or one_group(layout.num_layers)
        self._num_groups = len(self.groups.windows)
        self._places = self.groups.places
        # Else made by the first call, which knows the type of the model's activations.
        self._attention = attention
        self._batch: StepBatch | None = None
        # By group, and window of the layers: those of one group may differ, where it is the only.
        self._plans: dict[tuple[int, int | None], Any] = {}
        # By group.
        self._slots: list[torch.Tensor] = []
        self._block_ids: list[torch.Tensor] = []
        self._offsets: list[torch.Tensor] = []

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._layout.block_size

    @property
    def batch(self) -> StepBatch:
        """The step that is on."""
        assert self._batch is not None, "attention outside a step"
        return self._batch

    def begin_step(self, batch: StepBatch) -> None:
        """Take the tables of a step for the layers to come."""
        self._slots, self._block_ids, self._offsets = [], [], []
        self._plans = {}
        self._batch = batch

    def begin_prepared(
        self, slots: list[torch.Tensor], plans: dict[tuple[int, int | None], Any]
    ) -> None:
        """Take tables that are on the device already, for ``cells`` and ``attend_written`` alone.

        Args:
            slots: int64, shape (T,), of each group.
            plans: Of the attention, by group and window; all that the layers will ask for.
        """
        self._batch = None
        self._slots = slots
        self._plans = plans

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        alibi: Alibi | None = None,
    ) -> torch.Tensor:
        """Write the new tokens' keys and values, then attend through the block tables.

        Args:
            layer_index: Which layer of the model.
            query: shape (T, num_heads, head_dim).
            keys: shape (T, num_kv_heads, head_dim), position already encoded.
            values: shape (T, num_kv_heads, head_dim).
            scale: Multiplies scores.
            window: Positions that a token sees, itself included; None for all.
            alibi: How scores fall with distance; None for not at all.

        Returns:
            shape (T, num_heads, head_dim), dtype of ``query``; valid until the next call.
        """
        cells = self.cells(layer_index)
        group, _ = self._places[layer_index]
        blocks, offsets = self._block_ids[group], self._offsets[group]
        kv_write(keys, values, cells.layer, blocks, offsets, kv_scales=cells.scales)
        return self.attend_written(layer_index, query, scale=scale, window=window, alibi=alibi)

    def cells(self, layer_index: int) -> Cells:
        """Where a layer of the model keeps keys and values, and the new tokens' places there."""
        if not self._slots:
            self._find_slots(self.batch)
        group, place = self._places[layer_index]
        return Cells(self._layers[place], self._scales[place], self._slots[group])

    def attend_written(
        self,
        layer_index: int,
        query: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        alibi: Alibi | None = None,
    ) -> torch.Tensor:
        """Attend where the new tokens' keys and values are in their ``cells`` already.

        Arguments and result as in ``attend``.
        """
        group, place = self._places[layer_index]
        layer, scales = self._layers[place], self._scales[place]
        if self._attention is None:
            dtype = compute_dtype(query.dtype, self._layout, self._device)
            self._attention = choose_attention(self._layout, query.shape[1], dtype, self._device)
        mixed = self._attention.run(
            self._plan(self._attention, group, window),
            query.to(self._attention.dtype),
            layer,
            scale,
            kv_scales=scales,
            alibi=alibi,
        )
        return mixed.to(query.dtype)

    def _find_slots(self, batch: StepBatch) -> None:
        # The groups take turns in the batch; here each has its slots side by side.
        slots = self._to_device(batch.slots.reshape(-1, self._num_groups).T)
        self._slots += slots.unbind()
        self._block_ids += (slots // self._layout.block_size).unbind()
        self._offsets += (slots % self._layout.block_size).unbind()

    def _plan(self, attention: Attention, group: int, window: int | None) -> Any:
        plan = self._plans.get((group, window))
        if plan is None:
            batch = self.batch
            plan = attention.plan(
                query_start=batch.query_start,
                context_lens=batch.context_lens,
                block_tables=batch.block_tables[:, group :: self._num_groups],
                window=window,
            )
            self._plans[group, window] = plan
        return plan

    def _to_device(self, array: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def compute_dtype(query_dtype: torch.dtype, layout: KvLayout, device: torch.device) -> torch.dtype:
    """The type that attention computes in.

    The wider one of queries and pool. A quantised pool has none of its own: there it is the
    queries', but float32 on a CPU, where conversion to bfloat16 took twice as long (AVX2).
    """
    if not layout.is_quantised:
        return torch.promote_types(query_dtype, layout.dtype)
    return torch.float32 if device.type == "cpu" else query_dtype
