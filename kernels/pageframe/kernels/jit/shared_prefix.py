"""Attend once to blocks that several sequences share, for all of them.

    sequence 0   [ shared prefix ............ )[ tail )
    sequence 1   [ shared prefix ............ )[ tail ....... )
    sequence 2   [ shared prefix ............ )[ tail .. )
                 one program, rows of all three      paged_decode, each its own

Rows are (sequence, head) pairs, so that each shared key is read once for all of them rather than
once for each. What comes out is one more partial result per sequence, which ``merge_splits`` puts
together with those of its tail (FlashInfer's cascade inference; Hydragen, arXiv 2402.05099).

Budget, per layer, for n sequences over P shared keys: reads 2 * P * num_kv_heads * head_dim *
itemsize bytes once per tile of rows, instead of n times; 4 * n * P * num_heads * head_dim flops as
before. 64 rows in bfloat16 do 64 flops per byte: still bound by memory, but by n times less.
"""

import triton
import triton.language as tl

from pageframe.kernels.jit.attend import attend_range, block_ids, empty_rows, finished_rows
from pageframe.kernels.jit.split_plan import MERGE_FIELDS

# An item: sequence whose table is followed, first slot, slots, first key, end of keys, which of
# a slot's partials it is.
PREFIX_FIELDS: tl.constexpr = tl.constexpr(8)


@triton.jit(do_not_specialize=["table_stride"])
def shared_prefix(
    query,
    layer,
    kv_scales,
    slopes,
    tables,
    prefixes,
    merges,
    context_lens,
    partial_output,
    partial_lse,
    table_stride,
    scale,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SIDE_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    SCALE_BLOCK_STRIDE: tl.constexpr,
    SCALE_SIDE_STRIDE: tl.constexpr,
    SCALE_TOKEN_STRIDE: tl.constexpr,
    SCALE_HEAD_STRIDE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Attend a range of shared keys with up to ROWS rows.

    Arguments are those of ``paged_decode``, but for ``prefixes``, int32 [num_items,
    PREFIX_FIELDS]; ``merges``, int32 [slots, MERGE_FIELDS], by ``split_plan``; and
    ``context_lens``, int32 [slots].
    """
    item = prefixes + tl.program_id(1) * PREFIX_FIELDS
    sequence = tl.load(item)
    first_slot = tl.load(item + 1)
    num_slots = tl.load(item + 2)
    start = tl.load(item + 3)
    end = tl.load(item + 4)
    part_of_slot = tl.load(item + 5)
    if start >= end:
        return

    kv_head = tl.program_id(0)
    channels = tl.arange(0, DIM)
    rows = tl.arange(0, ROWS)
    is_row = rows < num_slots * GROUP
    slots = first_slot + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    is_element = is_row[:, None] & (channels[None, :] < HEAD_DIM)
    merge = merges + slots * MERGE_FIELDS
    tokens = tl.load(merge, mask=is_row, other=0).to(tl.int64)
    partials = tl.load(merge + 1, mask=is_row, other=0).to(tl.int64) + part_of_slot
    query_at = (tokens * QUERY_STRIDE + heads * HEAD_DIM)[:, None] + channels[None, :]
    query_tile = tl.load(query + query_at, mask=is_element, other=0.0).to(DOT)
    row_slopes = tl.zeros((ROWS,), tl.float32)
    row_positions = tl.zeros((ROWS,), tl.int32)
    if HAS_SLOPES:
        row_slopes = tl.load(slopes + heads, mask=is_row, other=0.0) / scale
        row_positions = tl.load(context_lens + slots, mask=is_row, other=1) - 1

    table = tables + sequence.to(tl.int64) * table_stride
    layer += kv_head * HEAD_STRIDE
    kv_scales += kv_head * SCALE_HEAD_STRIDE
    blocks = block_ids(table, start + tl.arange(0, TILE), start, end, BLOCK_SIZE, False)
    even, odd, highest, total = empty_rows(ROWS, DIM, HAS_SCALES)
    full_end = start + (end - start) // TILE * TILE
    for part in tl.static_range(2):
        even, odd, highest, total, blocks = attend_range(
            even,
            odd,
            highest,
            total,
            blocks,
            query_tile,
            row_positions,
            row_slopes,
            table,
            layer,
            kv_scales,
            scale * 1.4426950408889634,
            start if part == 0 else full_end,
            full_end if part == 0 else end,
            start,
            end,
            TILE,
            DIM,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_STRIDE,
            SIDE_STRIDE,
            TOKEN_STRIDE,
            SCALE_BLOCK_STRIDE,
            SCALE_SIDE_STRIDE,
            SCALE_TOKEN_STRIDE,
            0,
            HAS_SCALES,
            HAS_SLOPES,
            False,
            part == 1,
        )

    mean = finished_rows(even, odd, total, ROWS, DIM, HAS_SCALES)
    partial_at = partials * (NUM_KV_HEADS * GROUP) + heads
    tl.store(
        partial_output + partial_at[:, None] * HEAD_DIM + channels[None, :], mean, mask=is_element
    )
    tl.store(partial_lse + partial_at, highest + tl.log2(total), mask=is_row)
