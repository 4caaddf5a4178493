"""Cut the keys of a batch of one-token queries into items of about equal size, on the device.

    slots   one per sequence: keys [first_key, context_len), in whole tiles   ■■■■■■■■■■ ■■ ■■■■■
    items   at most ``tiles_per_item`` tiles each                             ■■■■|■■■|■■■ ■■ ■■■|■■
    partials, the results of items; those of shared prefixes come first in each slot

An item is as long as fills the chip once: all tiles over the programs that it holds at a time,
but no shorter than merging is worth. A batch of S slots then has at most S + target items however
its lengths are spread, so that the grid, and with it a CUDA graph, depends on S alone. SGLang
computes splits on the device likewise, as one count per sequence; FlashInfer's plan finds one
chunk size per batch on the host.

A fixed length of items instead makes the result of a sequence independent of its batch.

Budget: one program. It reads 20 bytes per slot and writes 16 per slot and 32 per item; latency
only, once per step and window, not per layer.
"""

import triton
import triton.language as tl

# A slot as given: token, sequence, first key, context length, partials of shared prefixes.
SLOT_FIELDS: tl.constexpr = tl.constexpr(5)
# An item: token, sequence, first key, end of keys, partial or -1, position of the token.
ITEM_FIELDS: tl.constexpr = tl.constexpr(8)
# What merging needs: token, first partial, number of partials.
MERGE_FIELDS: tl.constexpr = tl.constexpr(4)


@triton.jit(do_not_specialize=["num_slots", "num_items"])
def split_plan(
    slots,
    items,
    merges,
    num_slots,
    num_items,
    SLOTS: tl.constexpr,
    TARGET_ITEMS: tl.constexpr,
    TILE: tl.constexpr,
    TILES_MIN: tl.constexpr,
    TILES_FIXED: tl.constexpr,
):
    """Fill ``items`` and ``merges``; items that are not needed get no keys.

    Args:
        slots: int32 [SLOT_FIELDS, num_slots]; a context length of 0 is an empty slot, and one
            whose token is -1 stands for no token at all.
        items: int32 [num_items, ITEM_FIELDS].
        merges: int32 [num_slots, MERGE_FIELDS].
        num_slots: Slots, empty ones included.
        num_items: Room for items: as many as a plan can have.
        SLOTS: ``num_slots`` rounded up to a power of two.
        TARGET_ITEMS: Items that fill the chip.
        TILE: Keys per tile.
        TILES_MIN: Tiles that an item has at least, if its sequence has as many.
        TILES_FIXED: Tiles per item; 0 to choose.
    """
    slot = tl.arange(0, SLOTS)
    is_slot = slot < num_slots
    token = tl.load(slots + slot, mask=is_slot, other=0)
    sequence = tl.load(slots + num_slots + slot, mask=is_slot, other=0)
    first_key = tl.load(slots + 2 * num_slots + slot, mask=is_slot, other=0)
    context_len = tl.load(slots + 3 * num_slots + slot, mask=is_slot, other=0)
    num_shared = tl.load(slots + 4 * num_slots + slot, mask=is_slot, other=0)

    tiles = (context_len - first_key + TILE - 1) // TILE
    if TILES_FIXED > 0:
        num_splits = (tiles + TILES_FIXED - 1) // TILES_FIXED
        split_tiles = tl.full((SLOTS,), TILES_FIXED, tl.int32)
    else:
        most = (tl.sum(tiles, 0) + TARGET_ITEMS - 1) // TARGET_ITEMS
        most = tl.maximum(most, TILES_MIN)
        num_splits = (tiles + most - 1) // most
        # Even parts of a sequence; fewer, if evenness leaves the last ones empty.
        num_splits = tl.maximum(num_splits, 1)
        split_tiles = tl.maximum((tiles + num_splits - 1) // num_splits, 1)
        num_splits = (tiles + split_tiles - 1) // split_tiles

    num_partials = num_shared + num_splits
    first_partial = tl.cumsum(num_partials, 0) - num_partials
    merge = merges + slot * MERGE_FIELDS
    tl.store(merge, token, mask=is_slot)
    tl.store(merge + 1, first_partial, mask=is_slot)
    tl.store(merge + 2, num_partials, mask=is_slot)

    first_item = tl.cumsum(num_splits, 0) - num_splits
    for split in tl.range(0, tl.max(num_splits, 0)):
        is_item = split < num_splits
        item = items + (first_item + split) * ITEM_FIELDS
        start = first_key + split * split_tiles * TILE
        end = tl.minimum(start + split_tiles * TILE, context_len)
        partial = tl.where(num_partials == 1, -1, first_partial + num_shared + split)
        tl.store(item, token, mask=is_item)
        tl.store(item + 1, sequence, mask=is_item)
        tl.store(item + 2, start, mask=is_item)
        tl.store(item + 3, end, mask=is_item)
        tl.store(item + 4, partial, mask=is_item)
        tl.store(item + 5, context_len - 1, mask=is_item)
    for base in tl.range(tl.sum(num_splits, 0), num_items, SLOTS):
        item = items + (base + slot) * ITEM_FIELDS
        tl.store(item + 2, 0, mask=base + slot < num_items)
        tl.store(item + 3, 0, mask=base + slot < num_items)
