"""Rotate queries and keys, and write keys and values into their slots: one pass over a projection.

    heads of a token    [ q 0 ... q Hq-1 | k 0 ... k Hkv-1 | v 0 ... v Hkv-1 ]     read once
                             │ rotate           │ rotate          │
                        rotated            cache, side 0     cache, side 1         written once
                                           (and a scale per token and head, if quantised)

Budget: per token (Hq + 2 Hkv) * D numbers are read and written, and D angles read; 6 operations a
number. For 32 + 16 heads of 128 in bfloat16 that is 24.5 KB a token: 47 us for 8,192 tokens at
4.3 TB/s. Bound by memory.

A program is one token and ``HEADS`` heads of one kind. A value is a head that turns by no angle,
so there is one path for all three; and a head that is not a query is stored by slot.

Rotation pairs channel ``c`` with ``c + D / 2``, as in Hugging Face checkpoints. After Su et al.,
"RoFormer" (2021). With ``HAS_NORM`` heads are normalised first (Qwen3: Henry et al., "Query-key
normalization for transformers", 2020).
"""

import triton
import triton.language as tl


def heads_per_program(half: int) -> int:
    """Heads that one program turns: 16 numbers of each half a thread, in one warp."""
    return max(512 // half, 1)


@triton.jit
def magnitude_max(first, second):
    """Largest magnitude of each row of two tiles, float32 [HEADS]; NaN where there is a NaN.

    Magnitudes compare as their bits do, and a NaN's are above all: so no NaN is lost, as it would
    be in a maximum of floats.
    """
    bits = tl.maximum(
        first.to(tl.int32, bitcast=True) & 0x7FFFFFFF,
        second.to(tl.int32, bitcast=True) & 0x7FFFFFFF,
    )
    return tl.max(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def rounded_to_e4m3(numbers):
    """Float32 numbers in [-448, 448], rounded half to even to what fp8 (e4m3) can hold.

    The conversion that follows is exact then, wherever it is made: Triton's interpreter loses the
    carry when a fraction rounds up to the next power of two.
    """
    bits = numbers.to(tl.int32, bitcast=True)
    # 3 of 23 fraction bits stay; a carry moves on into the exponent, as it should.
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    # Below 2^-6 steps are 2^-9 wide: the sum has no bits left for less.
    small = (numbers + 24576.0) - 24576.0
    return tl.where(tl.abs(numbers) < 0.015625, small, normal.to(tl.float32, bitcast=True))


@triton.jit
def as_stored(numbers, scales, STORED_MAX: tl.constexpr, IS_INTEGER: tl.constexpr):
    """Numbers in units of their row's scale, rounded to what is stored, and within it."""
    quotients = tl.math.div_rn(numbers, tl.broadcast_to(scales[:, None], numbers.shape))
    # A quotient passes the end by a rounding error, and fp8 beyond its end would be a NaN.
    quotients = tl.minimum(tl.maximum(quotients, -STORED_MAX), STORED_MAX)
    if IS_INTEGER:
        # 1.5 * 2^23: the sum has no bits left for a fraction, and rounds half to even.
        return (quotients + 12582912.0) - 12582912.0
    return rounded_to_e4m3(quotients)


@triton.jit
def rotary_write(
    heads,
    cosines,
    sines,
    norm_weight,
    rotated,
    layer,
    scales,
    slots,
    heads_stride,
    cosines_stride,
    sines_stride,
    rotated_stride,
    block_stride,
    scale_block_stride,
    epsilon,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STORED_MAX: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """One token, ``HEADS`` heads of one kind.

    Args:
        heads: [T, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM], heads of a token contiguous.
        cosines: [T, HEAD_DIM / 2], any floating type.
        sines: [T, HEAD_DIM / 2].
        norm_weight: [NUM_HEADS + NUM_KV_HEADS, HEAD_DIM]; not read without ``HAS_NORM``.
        rotated: [T, NUM_HEADS, HEAD_DIM]; may be the queries in ``heads`` themselves.
        layer: [num_blocks, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM], each block contiguous.
        scales: float32 [num_blocks, 2, BLOCK_SIZE, NUM_KV_HEADS], each block contiguous; not
            written unless the type of ``layer`` is quantised.
        slots: int64 [T]; below zero nothing is written.
        heads_stride: From a token to the next; strides are in elements.
        cosines_stride: From a token to the next.
        sines_stride: From a token to the next.
        rotated_stride: From a token to the next.
        block_stride: From a block to the next.
        scale_block_stride: From a block's scales to the next one's.
        epsilon: Added to the mean of squares of a head.
        NUM_HEADS: Query heads.
        NUM_KV_HEADS: Key heads, and value heads.
        HEAD_DIM: Channels per head, even.
        HALF: Half of that, rounded up to a power of two.
        HEADS: Heads per program.
        BLOCK_SIZE: Tokens per block.
        STORED_MAX: Largest stored number of a quantised layer; 0 for any other.
        IS_INTEGER: Whether stored numbers are integers.
        HAS_NORM: Whether queries and keys are normalised.

    Grid: (T, ceil(NUM_HEADS / HEADS) + 2 * ceil(NUM_KV_HEADS / HEADS)).
    """
    PAIRS: tl.constexpr = HEAD_DIM // 2
    QUERY_TILES: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_TILES: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    is_query = tile < QUERY_TILES
    is_value = tile >= QUERY_TILES + KV_TILES
    side = tl.where(is_value, 1, 0)
    in_kind = tl.where(is_query, tile, tile - QUERY_TILES - side * KV_TILES)
    num_in_kind = tl.where(is_query, NUM_HEADS, NUM_KV_HEADS)
    before = tl.where(is_query, 0, NUM_HEADS + side * NUM_KV_HEADS)

    head = in_kind * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    is_pair = pair < PAIRS
    is_inside = (head < num_in_kind)[:, None] & is_pair[None, :]
    at = (before + head)[:, None] * HEAD_DIM + pair[None, :]
    source = heads + token * heads_stride + at
    first = tl.load(source, mask=is_inside, other=0.0).to(tl.float32)
    second = tl.load(source + PAIRS, mask=is_inside, other=0.0).to(tl.float32)

    cosine = tl.load(cosines + token * cosines_stride + pair, mask=is_pair, other=0.0)
    sine = tl.load(sines + token * sines_stride + pair, mask=is_pair, other=0.0)
    cosine = cosine.to(tl.float32)[None, :]
    sine = sine.to(tl.float32)[None, :]
    turning, turning_too = first, second
    if HAS_NORM:
        mean_square = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM
        factor = tl.rsqrt(mean_square + epsilon)[:, None]
        # Values have no weights; what is read in their place is not used.
        is_weight = is_inside & (tile < QUERY_TILES + KV_TILES)
        weight = tl.load(norm_weight + at, mask=is_weight, other=0.0).to(tl.float32)
        weight_too = tl.load(norm_weight + at + PAIRS, mask=is_weight, other=0.0).to(tl.float32)
        turning = first * factor * weight
        turning_too = second * factor * weight_too
    turned = tl.where(is_value, first, turning * cosine - turning_too * sine)
    turned_too = tl.where(is_value, second, turning_too * cosine + turning * sine)
    # Keys are what a cache of this type would hold, before they are quantised.
    turned = turned.to(heads.dtype.element_ty).to(tl.float32)
    turned_too = turned_too.to(heads.dtype.element_ty).to(tl.float32)

    if is_query:
        query = rotated + token * rotated_stride + at
        tl.store(query, turned.to(rotated.dtype.element_ty), mask=is_inside)
        tl.store(query + PAIRS, turned_too.to(rotated.dtype.element_ty), mask=is_inside)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        is_written = is_inside & (slot >= 0)
        block = slot // BLOCK_SIZE
        row = (side * BLOCK_SIZE + slot % BLOCK_SIZE) * NUM_KV_HEADS + head
        cell = layer + block * block_stride + row[:, None] * HEAD_DIM + pair[None, :]
        if STORED_MAX > 0.0:
            scale = tl.math.div_rn(
                magnitude_max(turned, turned_too),
                tl.full((HEADS,), STORED_MAX, tl.float32),
            )
            # The smallest normal number, as in ops/quantise.py: a row of zeros stays zero.
            scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
            turned = as_stored(turned, scale, STORED_MAX, IS_INTEGER)
            turned_too = as_stored(turned_too, scale, STORED_MAX, IS_INTEGER)
            is_row = (head < NUM_KV_HEADS) & (slot >= 0)
            tl.store(scales + block * scale_block_stride + row, scale, mask=is_row)
        tl.store(cell, turned.to(layer.dtype.element_ty), mask=is_written)
        tl.store(cell + PAIRS, turned_too.to(layer.dtype.element_ty), mask=is_written)
