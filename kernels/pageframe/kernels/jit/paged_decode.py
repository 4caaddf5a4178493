"""One new token per sequence, over its keys in parts (split KV).

    program (head program, item)          an item is a range of one sequence's keys; split_plan.py
    ────────────────────────────          ────────────────────────────────────────────────────────
    rows   heads that share one key head, at least 16: the smallest product of a tensor core
    keys   [start, end) of the item, in tiles

Grouped heads as rows read each key once for all of them (FlashInfer, SGLang). An item that is its
sequence's only one writes the result; others leave a partial result for ``merge_splits``. The grid
is as large as items can become, so that a CUDA graph holds any batch of its size; items that are
not there end at once.

Budget, per layer: every key and value is read once, 2 * L * num_kv_heads * head_dim * itemsize
bytes for L keys in all; 4 * L * num_heads * head_dim flops, which is 2 * group flops per key or
value: a group of 4 in bfloat16 does 4 flops per byte, 60 times fewer than Hopper needs to be
bound by them. Partial results add 8 * num_heads * head_dim bytes per item, written and read.
"""

import triton
import triton.language as tl

from pageframe.kernels.jit.attend import attend_range, block_ids, empty_rows, finished_rows
from pageframe.kernels.jit.split_plan import ITEM_FIELDS


@triton.jit(do_not_specialize=["table_stride"])
def paged_decode(
    query,
    layer,
    kv_scales,
    slopes,
    tables,
    items,
    output,
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
    """Attend one item with the heads of one key head.

    Args:
        query: [T, NUM_KV_HEADS * GROUP, HEAD_DIM], heads of a token side by side.
        layer: [num_blocks, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM] with the strides below.
        kv_scales: fp32 [num_blocks, 2, BLOCK_SIZE, NUM_KV_HEADS]; anything without HAS_SCALES.
        slopes: fp32 [NUM_KV_HEADS * GROUP]; anything without HAS_SLOPES.
        tables: int32 [S, table_stride].
        items: int32 [num_items, ITEM_FIELDS], by ``split_plan``.
        output: [T, NUM_KV_HEADS * GROUP, HEAD_DIM], contiguous.
        partial_output: fp32 [partials, NUM_KV_HEADS * GROUP, HEAD_DIM].
        partial_lse: fp32 [partials, NUM_KV_HEADS * GROUP], base 2.
        table_stride: Entries per row of ``tables``.
        scale: Multiplies scores.
        GROUP: Query heads per key head.
        NUM_KV_HEADS: Key heads.
        QUERY_STRIDE: From a token of ``query`` to the next, in elements.
        ROWS: Heads per program.
        TILE: Keys per tile.
        DIM: HEAD_DIM rounded up to a power of two.
        HEAD_DIM: Channels per head.
        BLOCK_SIZE: Tokens per block.
        BLOCK_STRIDE: Of ``layer``, in elements, as those that follow.
        SIDE_STRIDE: Of ``layer``.
        TOKEN_STRIDE: Of ``layer``.
        HEAD_STRIDE: Of ``layer``.
        SCALE_BLOCK_STRIDE: Of ``kv_scales``.
        SCALE_SIDE_STRIDE: Of ``kv_scales``.
        SCALE_TOKEN_STRIDE: Of ``kv_scales``.
        SCALE_HEAD_STRIDE: Of ``kv_scales``.
        HAS_SCALES: Whether the layer is quantised.
        HAS_SLOPES: Whether scores fall with distance (ALiBi).
        DOT: Type that products are taken in.
    """
    item = items + tl.program_id(1) * ITEM_FIELDS
    token = tl.load(item)
    sequence = tl.load(item + 1)
    start = tl.load(item + 2)
    end = tl.load(item + 3)
    partial = tl.load(item + 4)
    position = tl.load(item + 5)
    if start >= end:
        return

    ROW_TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    kv_head = tl.program_id(0) // ROW_TILES
    members = tl.program_id(0) % ROW_TILES * ROWS + tl.arange(0, ROWS)
    heads = kv_head * GROUP + members
    channels = tl.arange(0, DIM)
    is_row = members < GROUP
    is_element = is_row[:, None] & (channels[None, :] < HEAD_DIM)
    row_at = heads[:, None] * HEAD_DIM + channels[None, :]
    own_query = query + token.to(tl.int64) * QUERY_STRIDE
    rows = tl.load(own_query + row_at, mask=is_element, other=0.0).to(DOT)
    row_slopes = tl.zeros((ROWS,), tl.float32)
    if HAS_SLOPES:
        row_slopes = tl.load(slopes + heads, mask=is_row, other=0.0) / scale
    row_positions = tl.full((ROWS,), 0, tl.int32) + position

    table = tables + sequence.to(tl.int64) * table_stride
    layer += kv_head * HEAD_STRIDE
    kv_scales += kv_head * SCALE_HEAD_STRIDE
    blocks = block_ids(table, start + tl.arange(0, TILE), start, end, BLOCK_SIZE, False)
    even, odd, highest, total = empty_rows(ROWS, DIM, HAS_SCALES)
    # The last, partial tile apart, so that full ones are not masked.
    full_end = start + (end - start) // TILE * TILE
    for part in tl.static_range(2):
        even, odd, highest, total, blocks = attend_range(
            even,
            odd,
            highest,
            total,
            blocks,
            rows,
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
    if partial < 0:
        own_output = output + token.to(tl.int64) * (NUM_KV_HEADS * GROUP * HEAD_DIM)
        tl.store(own_output + row_at, mean.to(output.dtype.element_ty), mask=is_element)
    else:
        partial_at = partial.to(tl.int64) * (NUM_KV_HEADS * GROUP)
        tl.store(partial_output + partial_at * HEAD_DIM + row_at, mean, mask=is_element)
        lse = highest + tl.log2(total)
        tl.store(partial_lse + partial_at + heads, lse, mask=is_row)
