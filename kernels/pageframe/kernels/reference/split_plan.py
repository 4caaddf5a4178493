"""Reference of ``jit.split_plan``: one sequence and one item at a time."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    """A part of one slot's keys, [start, end), and which partial result it makes; -1 for none."""

    slot: int
    start: int
    end: int
    partial: int


def split_plan(
    first_keys: list[int],
    context_lens: list[int],
    num_shared: list[int],
    *,
    tile: int,
    target_items: int,
    tiles_min: int,
    tiles_fixed: int = 0,
) -> tuple[list[Item], list[tuple[int, int]]]:
    """Cut slots into items; arguments as those of the kernel.

    Returns:
        The items, and of each slot its first partial and how many it has.
    """
    tiles = [
        -(-(context_len - first_key) // tile)
        for first_key, context_len in zip(first_keys, context_lens, strict=True)
    ]
    most = tiles_fixed or max(tiles_min, -(-sum(tiles) // target_items))
    items, merges = [], []
    num_partials = 0
    for slot, num_tiles in enumerate(tiles):
        item_tiles = most
        if not tiles_fixed and num_tiles:
            # Even parts, as many as it takes.
            item_tiles = -(-num_tiles // -(-num_tiles // most))
        parts = range(0, num_tiles, item_tiles)
        count = num_shared[slot] + len(parts)
        merges.append((num_partials, count))
        for part, first_tile in enumerate(parts):
            start = first_keys[slot] + first_tile * tile
            items.append(
                Item(
                    slot=slot,
                    start=start,
                    end=min(start + item_tiles * tile, context_lens[slot]),
                    partial=-1 if count == 1 else num_partials + num_shared[slot] + part,
                )
            )
        num_partials += count
    return items, merges
