"""A plan of Triton attention in device memory: tables that the host sends in one copy.

A plan that a CUDA graph holds has no copy of its own: its slots and prefixes lie in memory that is
sent with everything else of a step (``decode_plan``), and are written there by ``fill_decode``.
"""

from dataclasses import dataclass

import numpy as np
import torch

from pageframe.kernels.ops.triton_attention_plan import (
    CHUNK_FIELDS,
    ITEM_FIELDS,
    MERGE_FIELDS,
    PREFIX_FIELDS,
    SLOT_FIELDS,
    Ints,
    Room,
    StepTables,
)

# In place of a token: nothing is written for such a slot.
_NO_TOKEN = -1
# Tables begin at multiples of 64 bytes: kernels are compiled anew for other alignments.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonPlan:
    """What all layers with the same window do in one step; all tensors are int32.

    Attributes:
        window: Positions that a token sees; None for all.
        room: Sizes of the tables.
        has_short_chunks: Whether chunks are tiles of ``short_prefill``.
        packed: The tables that come from the host, one after the other; None in a ``decode_plan``.
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
    packed: torch.Tensor | None
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


def decode_plan(
    room: Room,
    *,
    window: int | None,
    slots: torch.Tensor,
    prefixes: torch.Tensor,
    tables: torch.Tensor,
    items: torch.Tensor,
    merges: torch.Tensor,
) -> TritonPlan:
    """A plan of sequences with one new token each, in memory of somebody else.

    Args:
        room: Sizes; without chunks.
        window: Positions that a token sees; None for all.
        slots: int32, at least SLOT_FIELDS * room.num_slots numbers side by side.
        prefixes: int32, at least room.num_prefixes * PREFIX_FIELDS numbers side by side.
        tables: int32, shape (at least room.num_sequences, room.table_width), contiguous.
        items: int32, shape (at least room.num_items, ITEM_FIELDS), contiguous.
        merges: int32, shape (at least room.num_slots, MERGE_FIELDS), contiguous.
    """
    return TritonPlan(
        window=window,
        room=room,
        has_short_chunks=False,
        packed=None,
        slots=slots[: SLOT_FIELDS * room.num_slots].view(SLOT_FIELDS, room.num_slots),
        prefixes=prefixes[: room.num_prefixes * PREFIX_FIELDS].view(-1, PREFIX_FIELDS),
        chunks=slots.new_empty(0, CHUNK_FIELDS),
        tables=tables[: room.num_sequences],
        items=items[: room.num_items],
        merges=merges[: room.num_slots],
    )


def fill_decode(step: StepTables, room: Room, slots: Ints, prefixes: Ints) -> None:
    """Write slots and prefixes of a step, for a plan of ``room`` on the device.

    A slot that is left over pads the batch: the token at its index has no keys, and gets zeros.

    Args:
        step: Of sequences with one new token each; sequence i has token i.
        room: Of the plan.
        slots: At least SLOT_FIELDS * room.num_slots numbers; written.
        prefixes: At least room.num_prefixes * PREFIX_FIELDS numbers; written.
    """
    num_slots, num_prefixes = step.slots.shape[1], step.prefixes.shape[0]
    own = slots[: SLOT_FIELDS * room.num_slots].reshape(SLOT_FIELDS, room.num_slots)
    own[:, :num_slots] = step.slots
    own[:, num_slots:] = 0
    own[0, num_slots:] = np.arange(num_slots, room.num_slots)
    items = prefixes[: room.num_prefixes * PREFIX_FIELDS].reshape(-1, PREFIX_FIELDS)
    items[:num_prefixes] = step.prefixes
    # One that is left over has no keys.
    items[num_prefixes:] = 0


def copy_tables(step: StepTables, plan: TritonPlan) -> None:
    """Copy tables to the device; what room is left over holds empty slots and tiles."""
    assert plan.packed is not None, "the tables of this plan are sent by somebody else"
    packed = np.zeros(plan.packed.shape[0], np.int32)
    first_token = plan.slots.storage_offset()
    packed[first_token : first_token + plan.room.num_slots] = _NO_TOKEN
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
