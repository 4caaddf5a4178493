"""A plan of Triton attention in device memory: tables that the host sends in one copy."""

from dataclasses import dataclass

import numpy as np
import torch

from pageframe.kernels.ops.triton_attention_plan import (
    CHUNK_FIELDS,
    ITEM_FIELDS,
    MERGE_FIELDS,
    PREFIX_FIELDS,
    SLOT_FIELDS,
    Room,
    StepTables,
)

# Tables begin at multiples of 64 bytes: kernels are compiled anew for other alignments.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonPlan:
    """What all layers with the same window do in one step; all tensors are int32.

    Attributes:
        window: Positions that a token sees; None for all.
        room: Sizes of the tables.
        has_short_chunks: Whether chunks are tiles of ``short_prefill``.
        packed: The tables that come from the host, one after the other.
        slots: [SLOT_FIELDS, room.num_slots].
        prefixes: [room.num_prefixes, PREFIX_FIELDS].
        chunks: [room.num_chunks, CHUNK_FIELDS].
        tables: [room.num_sequences, room.table_width].
        items: [room.num_items, ITEM_FIELDS], made on the device.
        merges: [room.num_slots, MERGE_FIELDS], made on the device.
    """

    window: int | None
    room: Room
    has_short_chunks: bool
    packed: torch.Tensor
    slots: torch.Tensor
    prefixes: torch.Tensor
    chunks: torch.Tensor
    tables: torch.Tensor
    items: torch.Tensor
    merges: torch.Tensor


def empty_plan(
    room: Room, *, window: int | None, has_short_chunks: bool, device: torch.device
) -> TritonPlan:
    """A plan whose tables are not filled yet."""
    shapes = [
        (SLOT_FIELDS, room.num_slots),
        (room.num_prefixes, PREFIX_FIELDS),
        (room.num_chunks, CHUNK_FIELDS),
        (room.num_sequences, room.table_width),
    ]
    ends = np.cumsum([_aligned(rows * columns) for rows, columns in shapes]).tolist()
    packed = torch.empty(ends[-1], dtype=torch.int32, device=device)
    slots, prefixes, chunks, tables = (
        packed[start:][: rows * columns].view(rows, columns)
        for start, (rows, columns) in zip([0, *ends[:-1]], shapes, strict=True)
    )
    return TritonPlan(
        window=window,
        room=room,
        has_short_chunks=has_short_chunks,
        packed=packed,
        slots=slots,
        prefixes=prefixes,
        chunks=chunks,
        tables=tables,
        items=packed.new_empty(room.num_items, ITEM_FIELDS),
        merges=packed.new_empty(room.num_slots, MERGE_FIELDS),
    )


def copy_tables(step: StepTables, plan: TritonPlan) -> None:
    """Copy tables to the device; what room is left over holds empty slots and tiles."""
    packed = np.zeros(plan.packed.shape[0], np.int32)
    for target, source in (
        (plan.slots, step.slots),
        (plan.prefixes, step.prefixes),
        (plan.chunks, step.chunks),
        (plan.tables, step.tables),
    ):
        start = target.storage_offset()
        room = packed[start : start + target.numel()].reshape(target.shape)
        room[: source.shape[0], : source.shape[1]] = source
    staged = torch.from_numpy(packed)
    if plan.packed.is_cuda:
        staged = staged.pin_memory()
    plan.packed.copy_(staged, non_blocking=True)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
