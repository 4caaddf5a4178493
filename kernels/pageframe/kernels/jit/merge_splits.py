"""Put partial results of one token together: a mean of means, weighted by what each one saw.

    result = sum_i 2^(lse_i - max) * partial_i / sum_i 2^(lse_i - max)

``lse`` is the base-2 logarithm of a part's sum of exponentials (FlashAttention, FlashInfer's
cascade); that of a part which saw nothing is minus infinity and weighs nothing, since the maximum
begins at a finite number. Parts are taken eight at a time in order, however many a batch may have
at most: the sum does not depend on the batch.

Budget: per token and head, 4 * (head_dim + 1) bytes per part, and one row written; bound by
latency. Tokens with a single part, which wrote the result itself, end at once. A token of no parts,
which pads the batch of a CUDA graph, gets zeros; a slot of no token gets nothing.
"""

import triton
import triton.language as tl

from pageframe.kernels.jit.attend import LOWEST
from pageframe.kernels.jit.split_plan import MERGE_FIELDS


@triton.jit
def merge_splits(
    partial_output,
    partial_lse,
    merges,
    output,
    NUM_HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Merge one head of one slot; the grid is (NUM_HEADS, slots).

    Args:
        partial_output: fp32 [partials, NUM_HEADS, HEAD_DIM].
        partial_lse: fp32 [partials, NUM_HEADS], base 2.
        merges: int32 [slots, MERGE_FIELDS], by ``split_plan``; a token below zero is none.
        output: [T, NUM_HEADS, HEAD_DIM], contiguous.
        NUM_HEADS: Query heads.
        PARTS: Partial results that are taken at a time.
        DIM: HEAD_DIM rounded up to a power of two.
        HEAD_DIM: Channels per head.
    """
    head = tl.program_id(0)
    merge = merges + tl.program_id(1) * MERGE_FIELDS
    token = tl.load(merge)
    first = tl.load(merge + 1)
    num_partials = tl.load(merge + 2)
    if (num_partials == 1) | (token < 0):
        return

    parts = tl.arange(0, PARTS)
    channels = tl.arange(0, DIM)
    is_channel = channels < HEAD_DIM
    highest = tl.full((1,), LOWEST, tl.float32)
    total = tl.zeros((1,), tl.float32)
    values = tl.zeros((DIM,), tl.float32)
    for base in tl.range(0, num_partials, PARTS):
        is_part = base + parts < num_partials
        at = (first + base + parts).to(tl.int64) * NUM_HEADS + head
        lse = tl.load(partial_lse + at, mask=is_part, other=-float("inf"))
        means = tl.load(
            partial_output + at[:, None] * HEAD_DIM + channels[None, :],
            mask=is_part[:, None] & is_channel[None, :],
            other=0.0,
        )
        higher = tl.maximum(highest, tl.max(lse, 0))
        weights = tl.exp2(lse - higher)
        fading = tl.exp2(highest - higher)
        total = total * fading + tl.sum(weights, 0)
        values = values * fading + tl.sum(weights[:, None] * means, 0)
        highest = higher
    mean = values / tl.where(total > 0.0, total, 1.0)
    row = output + (token.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
    tl.store(row + channels, mean.to(output.dtype.element_ty), mask=is_channel)
