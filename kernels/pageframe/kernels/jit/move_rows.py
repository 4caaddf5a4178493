"""Rows of bytes from one memory to another: copy-on-write, compaction, and swaps in and out.

    source   [ row 7 ]  [ row 2 ]  [ row 9 ]          any rows of one memory
                 │          │          │              16 bytes per thread and load
    target   [ row 0 ]  [ row 5 ]  [ row 1 ]          any rows of another, or of the same

Budget: each byte of a row is read once and written once, and nothing is computed; ids are 16 bytes
a row. With rows of 2 MB the copy bandwidth of the device is the whole time.

A row is cut into slices and each (row, slice) is a program, so that two large rows fill a device as
well as a thousand small ones. All programs may run at once: no target is another move's source.
"""

import triton
import triton.language as tl

# Constants of every launch; the compile gate compiles with the same. 16 KiB per program: eight
# loads of 16 bytes per thread are in flight before the first store.
SLICE_WORDS = 4096
NUM_WARPS = 4


@triton.jit
def move_rows(
    source,
    source_ids,
    target,
    target_ids,
    source_row_words,
    target_row_words,
    num_words,
    SLICE_WORDS: tl.constexpr,
):
    """Copy the first ``num_words`` of row ``source_ids[i]`` to row ``target_ids[i]``.

    Args:
        source: int32 words.
        source_ids: int64 [C].
        target: int32 words.
        target_ids: int64 [C], none twice.
        source_row_words: From a row to the next.
        target_row_words: From a row to the next.
        num_words: Words of a row that are copied.
        SLICE_WORDS: Words per program, a power of two.

    Grid: (C, ceil(num_words / SLICE_WORDS)).
    """
    pair = tl.program_id(0)
    words = tl.program_id(1) * SLICE_WORDS + tl.arange(0, SLICE_WORDS)
    is_inside = words < num_words
    # A pool has more than 2^31 words: 64 bits before the product.
    from_row = source + tl.load(source_ids + pair).to(tl.int64) * source_row_words
    to_row = target + tl.load(target_ids + pair).to(tl.int64) * target_row_words
    moved = tl.load(from_row + words, mask=is_inside)
    tl.store(to_row + words, moved, mask=is_inside)
