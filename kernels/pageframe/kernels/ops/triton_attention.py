"""Causal attention of new tokens over paged keys and values, by Triton kernels.

Plan, then run, as ``ops.paged_attention`` does and with the same arguments. A plan is a few tables
on the device; running a layer makes no decision on the host, so that its launches, up to four of
them, can be captured in a CUDA graph:

    one new token        shared_prefix, for keys that several sequences share
                         paged_decode, for all others, in parts
                         merge_splits
    several new tokens   paged_prefill

A graph needs launches of one size and tables at one address: plan with a ``Room`` for the largest
batch of the graph, run it, capture, and ``refill`` that plan before each replay. For graphs of
decodes alone ``decode_room`` says how large that is, and ``decode_step`` what to write into it
(``triton_attention_tables``). What runs inside a graph needs a ``TritonAttention`` of its own:
results and partial results lie in memory that grows with the largest batch so far, and a graph
remembers where it was.

On tensors of a CPU everything runs in Triton's interpreter, in float32 (its bfloat16 arithmetic is
wrong); the variable TRITON_INTERPRET has to be set before this module is imported.
"""

from typing import Any

import numpy as np
import torch
import triton

from pageframe.kernels.jit.attention_shape import AttentionShape, padded_dim
from pageframe.kernels.jit.attention_tiles import AttentionTiles, Tile, attention_tiles
from pageframe.kernels.jit.merge_splits import merge_splits
from pageframe.kernels.jit.paged_decode import paged_decode
from pageframe.kernels.jit.paged_prefill import paged_prefill
from pageframe.kernels.jit.shared_prefix import shared_prefix
from pageframe.kernels.jit.split_plan import split_plan
from pageframe.kernels.layouts import KvLayout
from pageframe.kernels.ops.alibi import Alibi
from pageframe.kernels.ops.quantise import check_scales
from pageframe.kernels.ops.triton_attention_checks import check_device, check_room, check_run
from pageframe.kernels.ops.triton_attention_plan import (
    FIXED_ITEM_KEYS,
    ITEM_KEYS_MIN,
    Ints,
    Room,
    StepPlanner,
    StepTables,
)
from pageframe.kernels.ops.triton_attention_tables import TritonPlan, copy_tables, empty_plan
from pageframe.kernels.scratch import Scratch

_TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class TritonAttention:
    """Plans and runs paged attention; owns the memory of partial results.

    Args:
        layout: Of the blocks.
        num_heads: Query heads, a multiple of the layout's heads.
        dtype: Of queries.
        device: Where everything lies.
        is_deterministic: Whether a sequence's result must not depend on what else is in its batch.
        tiles: Other tiles than the table's.

    Raises:
        ValueError: the device cannot run these kernels with these types.

    Attributes:
        dtype: As above.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_heads: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_deterministic: bool = False,
        tiles: AttentionTiles | None = None,
    ) -> None:
        capability, num_processors = check_device(device, dtype, layout)
        self.dtype = dtype
        self._layout = layout
        self._num_heads = num_heads
        self._device = device
        # Products in float16 convert fp8 in one instruction, in bfloat16 in many.
        dot_dtype = torch.float16 if layout.dtype == torch.float8_e4m3fn else dtype
        self._dot_dtype = "fp32" if device.type == "cpu" else _TYPE_NAMES[dot_dtype]
        group_size = num_heads // layout.num_kv_heads
        self._tiles = tiles or attention_tiles(
            capability=capability,
            num_processors=num_processors,
            group_size=group_size,
            padded_dim=padded_dim(layout.head_dim),
            itemsize=int(layout.dtype.itemsize),
            dot_itemsize=4 if self._dot_dtype == "fp32" else 2,
        )
        self._planner = StepPlanner(
            block_size=layout.block_size,
            group_size=group_size,
            num_kv_heads=layout.num_kv_heads,
            tiles=self._tiles,
            is_deterministic=is_deterministic,
        )
        self._row_tiles = -(-group_size // self._tiles.decode.rows)
        self._target_items = max(
            1, self._tiles.num_decode_programs // (layout.num_kv_heads * self._row_tiles)
        )
        self._output = Scratch(dtype, device)
        self._partials = Scratch(torch.float32, device)
        # Where a kernel wants an address that it will not follow.
        self._nothing = torch.zeros(16, device=device)
        self._shapes: dict[tuple[object, ...], AttentionShape] = {}

    def plan(
        self,
        *,
        query_start: Ints,
        context_lens: Ints,
        block_tables: Ints,
        window: int | None,
        room: Room | None = None,
    ) -> TritonPlan:
        """Work out one step; arguments as in the reference of paged attention.

        Args:
            query_start: As there.
            context_lens: As there.
            block_tables: As there.
            window: As there.
            room: Sizes of tables that a later ``refill`` shall find, for chunks of any length; None
                for what this step needs.

        Raises:
            ValueError: the window is smaller than one, or the room too small.
        """
        may_be_short = room is None
        step = self._step(query_start, context_lens, block_tables, window, may_be_short)
        needed = self._needed_room(step)
        room = room or needed
        check_room(needed, room)
        plan = empty_plan(
            room, window=window, has_short_chunks=step.has_short_chunks, device=self._device
        )
        copy_tables(step, plan)
        self.split(plan)
        return plan

    def refill(
        self, plan: TritonPlan, *, query_start: Ints, context_lens: Ints, block_tables: Ints
    ) -> None:
        """Plan another step in the memory of ``plan``; arguments as in ``plan``.

        Raises:
            ValueError: the plan has too little room, or its tiles do not fit.
        """
        step = self._step(
            query_start, context_lens, block_tables, plan.window, plan.has_short_chunks
        )
        check_room(self._needed_room(step), plan.room)
        if plan.has_short_chunks and not step.has_short_chunks:
            raise ValueError("a plan for short chunks was made without a room for longer ones")
        copy_tables(step, plan)
        self.split(plan)

    def decode_room(self, num_sequences: int, table_width: int, *, window: int | None) -> Room:
        """Room for any batch of so many sequences with one new token each.

        Args:
            num_sequences: Sequences, empty slots included.
            table_width: Blocks of the longest sequence.
            window: Positions that a token sees; None for all.
        """
        num_prefixes, num_shared = 0, 0
        if window is None:
            num_prefixes, num_shared = self._planner.prefix_bounds(num_sequences)
        num_items = num_sequences + self._target_items
        if self._planner.is_deterministic:
            longest = table_width * self._layout.block_size
            num_items = num_sequences * -(-longest // FIXED_ITEM_KEYS)
        return Room(
            num_slots=num_sequences,
            num_items=num_items,
            num_partials=num_items + num_shared,
            num_prefixes=num_prefixes,
            num_chunks=0,
            num_sequences=num_sequences,
            table_width=table_width,
        )

    def decode_step(
        self, context_lens: Ints, block_tables: Ints, *, window: int | None, room: Room
    ) -> StepTables:
        """Slots and prefixes of sequences with one new token each, on the host.

        Args:
            context_lens: As in the reference of paged attention.
            block_tables: As there.
            window: As there.
            room: Sizes of the plan that they are for.

        Raises:
            ValueError: the room is too small.
        """
        query_start = np.arange(len(context_lens) + 1, dtype=np.int32)
        step = self._step(query_start, context_lens, block_tables, window, False)
        check_room(self._needed_room(step), room)
        return step

    def run(
        self,
        plan: TritonPlan,
        query: torch.Tensor,
        layer: torch.Tensor,
        scale: float,
        *,
        kv_scales: torch.Tensor | None = None,
        alibi: Alibi | None = None,
    ) -> torch.Tensor:
        """Attend in one layer.

        Args:
            plan: Of this step, for this layer's window.
            query: shape (T, num_heads, head_dim), of ``dtype``.
            layer: shape (num_blocks, 2, block_size, num_kv_heads, head_dim), channels side by
                side, other strides as they are.
            scale: Multiplies scores before the softmax; positive.
            kv_scales: float32, shape (num_blocks, 2, block_size, num_kv_heads), any strides; None
                exactly if ``layer`` is of no quantised type.
            alibi: How scores fall with distance; None for not at all.

        Returns:
            shape (T, num_heads, head_dim), scratch memory: valid until the next run.

        Raises:
            ValueError: shapes that do not belong together.
        """
        slopes = None if alibi is None else alibi.slopes
        check_run(query, layer, self._layout, self._num_heads, scale, slopes)
        check_scales(layer, kv_scales)
        if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
            query = query.contiguous()
        shape = self._shape(query, layer, kv_scales, slopes)
        output = self._output.take("output", *query.shape)
        given = (
            query,
            layer,
            self._nothing if kv_scales is None else kv_scales,
            self._nothing if slopes is None else slopes,
            plan.tables,
        )
        if plan.room.num_slots:
            self._run_slots(plan, shape, given, output, scale)
        if plan.room.num_chunks:
            tile = self._tiles.short_prefill if plan.has_short_chunks else self._tiles.prefill
            paged_prefill[(shape.num_kv_heads, plan.room.num_chunks)](
                *given,
                plan.chunks,
                output,
                plan.room.table_width,
                scale,
                **shape.constants(tile.rows, tile.keys),
                WINDOW=plan.window or 0,
                **_options(tile),
            )
        return output

    def _run_slots(
        self,
        plan: TritonPlan,
        shape: AttentionShape,
        given: tuple[torch.Tensor, ...],
        output: torch.Tensor,
        scale: float,
    ) -> None:
        """Sequences with one new token: what they share, what they do not, and both together."""
        room = plan.room
        heads = (room.num_partials, shape.num_heads)
        partials = (
            self._partials.take("partials", *heads, shape.head_dim),
            self._partials.take("lse", *heads),
        )
        if room.num_prefixes:
            tile = self._tiles.prefix
            shared_prefix[(shape.num_kv_heads, room.num_prefixes)](
                *given,
                plan.prefixes,
                plan.merges,
                plan.slots[3],
                *partials,
                room.table_width,
                scale,
                **shape.constants(tile.rows, tile.keys),
                **_options(tile),
            )
        tile = self._tiles.decode
        paged_decode[(shape.num_kv_heads * self._row_tiles, room.num_items)](
            *given,
            plan.items,
            output,
            *partials,
            room.table_width,
            scale,
            **shape.constants(tile.rows, tile.keys),
            **_options(tile),
        )
        merge_splits[(shape.num_heads, room.num_slots)](
            *partials, plan.merges, output, **shape.merge_constants(), num_warps=4
        )

    def _step(
        self,
        query_start: Ints,
        context_lens: Ints,
        block_tables: Ints,
        window: int | None,
        may_be_short: bool,
    ) -> StepTables:
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; at least the token itself must be seen")
        return self._planner.step(
            query_start=query_start,
            context_lens=context_lens,
            block_tables=block_tables,
            window=window,
            may_be_short=may_be_short,
        )

    def _needed_room(self, step: StepTables) -> Room:
        num_slots = step.slots.shape[1]
        num_items = num_slots + self._target_items if num_slots else 0
        if self._planner.is_deterministic:
            num_items = step.num_fixed_items
        return Room(
            num_slots=num_slots,
            num_items=num_items,
            num_partials=num_items + step.num_shared_partials,
            num_prefixes=step.prefixes.shape[0],
            num_chunks=step.chunks.shape[0],
            num_sequences=step.tables.shape[0],
            table_width=step.tables.shape[1],
        )

    def split(self, plan: TritonPlan) -> None:
        """Cut the slots of a filled plan into items; the part of planning that a graph may hold."""
        if not plan.room.num_slots:
            return
        keys = self._tiles.decode.keys
        split_plan[(1,)](
            plan.slots,
            plan.items,
            plan.merges,
            plan.room.num_slots,
            plan.room.num_items,
            SLOTS=max(1024, triton.next_power_of_2(plan.room.num_slots)),
            TARGET_ITEMS=self._target_items,
            TILE=keys,
            TILES_MIN=max(1, ITEM_KEYS_MIN // keys),
            TILES_FIXED=FIXED_ITEM_KEYS // keys if self._planner.is_deterministic else 0,
            num_warps=8,
        )

    def _shape(
        self,
        query: torch.Tensor,
        layer: torch.Tensor,
        kv_scales: torch.Tensor | None,
        slopes: torch.Tensor | None,
    ) -> AttentionShape:
        scale_strides = None if kv_scales is None else kv_scales.stride()
        key = (query.stride(0), layer.stride(), scale_strides, slopes is None)
        shape = self._shapes.get(key)
        if shape is None:
            shape = AttentionShape(
                num_heads=self._num_heads,
                num_kv_heads=self._layout.num_kv_heads,
                head_dim=self._layout.head_dim,
                block_size=self._layout.block_size,
                query_stride=query.stride(0),
                layer_strides=layer.stride()[:4],
                scale_strides=scale_strides,
                has_slopes=slopes is not None,
                dot_dtype=self._dot_dtype,
            )
            self._shapes[key] = shape
        return shape


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
