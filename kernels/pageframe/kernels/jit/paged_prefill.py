"""Several new tokens per sequence, causal, over its keys.

    program (key head, tile of rows)
    ────────────────────────────────
    rows    r = token * GROUP + member: the new tokens of one sequence, times the heads that share
            the key head; tiles cut this line anywhere, so that no group size wastes rows
    keys    [low, last position], in tiles

        keys    0 ─── low ──────────────────────────────────────────── last
                       [ cut by windows )[ seen by all rows )[ diagonal ]
                            masked            not masked        masked

Only tiles at the two ends pay for masks, and tiles before the window are not read. 128 rows and
8 warps are what the asynchronous tensor core instruction of Hopper wants: 16 rows, as decode has
them, cannot use it (vLLM's unified kernel does, at a third of the speed).

Which rows are whose is worked out once per step on the host, longest tiles first, so that the last
programs to run are short ones (FlashAttention-3). A tile of no rows ends at once.

Budget, per layer, for L new tokens on an empty cache: 2 * num_heads * head_dim * L^2 flops (half of
the square). Each tile of R rows reads its keys and values once: R * 2 / itemsize flops per byte
from the second-level cache, 128 for bfloat16, which is bound by flops on Hopper.
"""

import triton
import triton.language as tl

from pageframe.kernels.jit.attend import attend_range, block_ids, empty_rows, finished_rows

# A tile of rows: sequence, first token in the batch, new tokens, first row, context length.
CHUNK_FIELDS: tl.constexpr = tl.constexpr(8)


@triton.jit(do_not_specialize=["table_stride"])
def paged_prefill(
    query,
    layer,
    kv_scales,
    slopes,
    tables,
    chunks,
    output,
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
    WINDOW: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Attend one tile of rows with one key head.

    Arguments are those of ``paged_decode``, but for ``chunks``, int32 [num_tiles, CHUNK_FIELDS];
    ROWS, rows per tile; and WINDOW, the positions that a token sees, itself included, 0 for all.
    """
    chunk = chunks + tl.program_id(1) * CHUNK_FIELDS
    sequence = tl.load(chunk)
    first_token = tl.load(chunk + 1)
    num_tokens = tl.load(chunk + 2)
    first_row = tl.load(chunk + 3)
    context_len = tl.load(chunk + 4)
    last_row = tl.minimum(first_row + ROWS, num_tokens * GROUP) - 1
    if first_row > last_row:
        return

    kv_head = tl.program_id(0)
    channels = tl.arange(0, DIM)
    # Rows past the end repeat the last one and are not written.
    rows = first_row + tl.arange(0, ROWS)
    own_rows = tl.minimum(rows, last_row)
    tokens = own_rows // GROUP
    heads = kv_head * GROUP + own_rows % GROUP
    batch_tokens = (first_token + tokens).to(tl.int64)
    query_at = batch_tokens * QUERY_STRIDE + heads * HEAD_DIM
    is_channel = channels[None, :] < HEAD_DIM
    query_tile = tl.load(
        query + query_at[:, None] + channels[None, :], mask=is_channel, other=0.0
    ).to(DOT)
    row_slopes = tl.zeros((ROWS,), tl.float32)
    if HAS_SLOPES:
        row_slopes = tl.load(slopes + heads) / scale
    first_position = context_len - num_tokens
    row_positions = first_position + tokens
    highest_position = first_position + last_row // GROUP
    lowest_position = first_position + first_row // GROUP

    # Tiles begin at multiples of their size, so that a row's sums do not depend on its tile.
    low = 0
    low_end = 0
    if WINDOW > 0:
        low = tl.maximum(lowest_position - WINDOW + 1, 0)
        low_end = tl.maximum(highest_position - WINDOW + 1, 0)
    start = low // TILE * TILE
    full_start = (low_end + TILE - 1) // TILE * TILE
    full_end = tl.maximum((lowest_position + 1) // TILE * TILE, full_start)
    limit = highest_position + 1

    table = tables + sequence.to(tl.int64) * table_stride
    layer += kv_head * HEAD_STRIDE
    kv_scales += kv_head * SCALE_HEAD_STRIDE
    blocks = block_ids(table, start + tl.arange(0, TILE), low, limit, BLOCK_SIZE, WINDOW > 0)
    even, odd, highest, total = empty_rows(ROWS, DIM, HAS_SCALES)
    # Part 0 is cut by windows, part 1 is seen by all, part 2 holds the diagonal.
    for part in tl.static_range(0 if WINDOW > 0 else 1, 3):
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
            start if part == 0 else (full_start if part == 1 else full_end),
            full_start if part == 0 else (full_end if part == 1 else limit),
            low,
            limit,
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
            WINDOW,
            HAS_SCALES,
            HAS_SLOPES,
            True,
            part != 1,
        )

    mean = finished_rows(even, odd, total, ROWS, DIM, HAS_SCALES)
    is_element = (rows <= last_row)[:, None] & is_channel
    row_at = (batch_tokens * (NUM_KV_HEADS * GROUP) + heads) * HEAD_DIM
    output_at = row_at[:, None] + channels[None, :]
    tl.store(output + output_at, mean.to(output.dtype.element_ty), mask=is_element)
