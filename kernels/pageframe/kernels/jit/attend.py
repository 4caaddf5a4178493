"""Attention of a tile of query rows over a range of one sequence's keys: the loop of all kernels.

    keys      start ............................. end           tiles of ``TILE`` keys
              [ tile )[ tile )[ tile )[ tile )[ ti)
    rows      [ROWS, DIM], each a token and a head that reads this key head

What a row has seen so far is its running maximum, its sum, and its weighted values; a tile moves
all three on (online softmax, FlashAttention). Scores stay in the units of the raw product and are
scaled once, inside the exponent, by ``qk_scale`` = scale * log2(e): scales must be positive.

Three ideas keep the loop free of cases:

- The running maximum begins at a finite number below every score, so a row that has seen nothing
  subtracts finite numbers and stays at zero weight; no infinity meets an infinity.
- Block ids of the next tile are loaded one tile early. A load that the address of another load
  waits for would take a stage of the pipeline for itself.
- One-byte keys are multiplied as they are stored, and their scales go into the scores. Values are
  scaled themselves: weights times scales would fall below float16's range. They are read two
  channels at a time, and the two halves of such a pair go to two products: an operand that is
  transposed on its way out of shared memory is moved in words of 16 bits or, slowly, byte by byte
  (decode on capability 90 with fp8: 110 registers instead of 224, no byte loads instead of 64).

Block ids become 64-bit before they are multiplied: a pool of all layers passes 2^31 elements soon.
"""

import triton
import triton.language as tl

# Below every score, and finite.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def block_ids(table, positions, low, limit, BLOCK_SIZE: tl.constexpr, HAS_LOW: tl.constexpr):
    """Blocks of positions in [low, limit); others read no entry, which may be undefined."""
    is_own = positions < limit
    if HAS_LOW:
        is_own &= positions >= low
    return tl.load(table + positions // BLOCK_SIZE, mask=is_own, other=0)


@triton.jit
def load_tile(
    addresses, is_own, is_channel, HAS_STRANGERS: tl.constexpr, HAS_PADDING: tl.constexpr
):
    """Numbers at addresses; zero where a key is not its sequence's, or a channel is padding."""
    if HAS_STRANGERS:
        is_there = is_own
        if HAS_PADDING:
            is_there = is_there & is_channel
        numbers = tl.load(addresses, mask=is_there, other=0.0)
    elif HAS_PADDING:
        numbers = tl.load(addresses, mask=is_channel, other=0.0)
    else:
        numbers = tl.load(addresses)
    return numbers


@triton.jit
def empty_rows(ROWS: tl.constexpr, DIM: tl.constexpr, HAS_SCALES: tl.constexpr):
    """State of rows that have seen no key: weighted values, maximum, sum.

    Of one-byte values even and odd channels are apart; of others all are among the even ones.
    """
    even = tl.zeros((ROWS, DIM // 2 if HAS_SCALES else DIM), tl.float32)
    odd = tl.zeros((ROWS, DIM // 2 if HAS_SCALES else 16), tl.float32)
    highest = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    return even, odd, highest, total


@triton.jit
def attend_range(
    even,
    odd,
    highest,
    total,
    blocks,
    query,
    row_positions,
    row_slopes,
    table,
    layer,
    scales,
    qk_scale,
    start,
    end,
    low,
    limit,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SIDE_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    SCALE_BLOCK_STRIDE: tl.constexpr,
    SCALE_SIDE_STRIDE: tl.constexpr,
    SCALE_TOKEN_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Let rows see tiles that begin in [start, end); returns their state and the next block ids.

    Args:
        even: fp32 [ROWS, ...], with ``odd``, ``highest`` and ``total``: see ``empty_rows``.
        odd: fp32 [ROWS, ...].
        highest: fp32 [ROWS].
        total: fp32 [ROWS].
        blocks: int32 [TILE], block ids of the first tile.
        query: [ROWS, DIM], in the type that products are taken in.
        row_positions: int32 [ROWS].
        row_slopes: fp32 [ROWS], added per position of distance, divided by the scale of scores.
        table: int32, block ids of the sequence.
        layer: Keys of this head in block 0.
        scales: fp32, scales of this head in block 0.
        qk_scale: Multiplies raw scores; base 2.
        start: Where the first tile begins.
        end: No tile begins here or later.
        low: Keys before are not read; only with a window.
        limit: Keys from here on are not read.
        TILE: Keys per tile.
        DIM: Channels, rounded up to a power of two.
        HEAD_DIM: Channels.
        BLOCK_SIZE: Tokens per block.
        BLOCK_STRIDE: From a block to the next; strides are in elements.
        SIDE_STRIDE: From keys to values.
        TOKEN_STRIDE: From a token to the next.
        SCALE_BLOCK_STRIDE: The same of scales.
        SCALE_SIDE_STRIDE: The same of scales.
        SCALE_TOKEN_STRIDE: The same of scales.
        WINDOW: Positions that a row sees, itself included; 0 for all.
        HAS_SCALES: Whether ``scales`` are there.
        HAS_SLOPES: Whether ``row_slopes`` count.
        IS_CAUSAL: Whether a row sees no position after its own.
        IS_MASKED: Whether a tile may hold keys that some row does not see.
    """
    channels = tl.arange(0, DIM)
    places = tl.arange(0, TILE)
    for first in tl.range(start, end, TILE):
        positions = first + places
        offsets = positions % BLOCK_SIZE
        wide_blocks = blocks.to(tl.int64)
        is_own = positions < limit
        if WINDOW > 0:
            is_own &= positions >= low
        at = wide_blocks * BLOCK_STRIDE + offsets * TOKEN_STRIDE
        key_tile = load_tile(
            layer + at[None, :] + channels[:, None],
            is_own[None, :],
            channels[:, None] < HEAD_DIM,
            IS_MASKED,
            DIM != HEAD_DIM,
        )
        raw = tl.dot(query, key_tile.to(query.dtype), input_precision="ieee")
        if HAS_SCALES:
            scale_at = wide_blocks * SCALE_BLOCK_STRIDE + offsets * SCALE_TOKEN_STRIDE
            key_scales = tl.load(scales + scale_at, mask=is_own, other=0.0)
            value_scales = tl.load(scales + SCALE_SIDE_STRIDE + scale_at, mask=is_own, other=0.0)
            raw *= key_scales[None, :]
            pairs = tl.arange(0, DIM // 2)
            pair_at = wide_blocks * (BLOCK_STRIDE // 2) + offsets * (TOKEN_STRIDE // 2)
            pair_tile = load_tile(
                layer.to(tl.pointer_type(tl.int16))
                + SIDE_STRIDE // 2
                + pair_at[:, None]
                + pairs[None, :],
                is_own[:, None],
                pairs[None, :] < HEAD_DIM // 2,
                IS_MASKED,
                DIM != HEAD_DIM,
            )
        else:
            value_tile = load_tile(
                layer + SIDE_STRIDE + at[:, None] + channels[None, :],
                is_own[:, None],
                channels[None, :] < HEAD_DIM,
                IS_MASKED,
                DIM != HEAD_DIM,
            )
        blocks = block_ids(table, positions + TILE, low, limit, BLOCK_SIZE, WINDOW > 0)
        if HAS_SLOPES:
            raw += row_slopes[:, None] * (positions[None, :] - row_positions[:, None])
        if IS_MASKED:
            is_seen = is_own[None, :]
            if IS_CAUSAL:
                is_seen = is_seen & (positions[None, :] <= row_positions[:, None])
                if WINDOW > 0:
                    is_seen = is_seen & (positions[None, :] > row_positions[:, None] - WINDOW)
            raw = tl.where(is_seen, raw, -float("inf"))
        higher = tl.maximum(highest, tl.max(raw, 1) * qk_scale)
        weights = tl.exp2(raw * qk_scale - higher[:, None])
        fading = tl.exp2(highest - higher)
        total = total * fading + tl.sum(weights, 1)
        highest = higher
        even *= fading[:, None]
        narrow = weights.to(query.dtype)
        if HAS_SCALES:
            odd *= fading[:, None]
            factors = value_scales.to(query.dtype)[:, None]
            stored: tl.constexpr = layer.dtype.element_ty
            low_bytes = pair_tile.to(tl.int8).to(stored, bitcast=True)
            high_bytes = (pair_tile >> 8).to(tl.int8).to(stored, bitcast=True)
            even = tl.dot(narrow, low_bytes.to(query.dtype) * factors, even, input_precision="ieee")
            odd = tl.dot(narrow, high_bytes.to(query.dtype) * factors, odd, input_precision="ieee")
        else:
            even = tl.dot(narrow, value_tile.to(query.dtype), even, input_precision="ieee")
    return even, odd, highest, total, blocks


@triton.jit
def finished_rows(
    even, odd, total, ROWS: tl.constexpr, DIM: tl.constexpr, HAS_SCALES: tl.constexpr
):
    """Attention of rows: weighted values over their sum; rows that saw nothing are zero."""
    values = even
    if HAS_SCALES:
        values = tl.reshape(tl.join(even, odd), (ROWS, DIM))
    return values / tl.where(total > 0.0, total, 1.0)[:, None]
