"""Tile sizes, warps and stages of attention kernels, by chip, width of heads and of stored numbers.

A table, not a search: tuning at run time stalls serving and cannot go into a CUDA graph. Every row
compiles without spills for its chips (see ``variants_attention``); speed on a chip is for
``bench.gpu`` to say.
"""

from dataclasses import dataclass, replace

HEAD_DIM_MAX = 256
# Of one-byte numbers, which are converted in registers: wider ones spill in every tile tried.
ONE_BYTE_HEAD_DIM_MAX = 128


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel's tile.

    Attributes:
        rows: Query rows per program.
        keys: Keys per turn of the loop.
        num_warps: Warps per program.
        num_stages: Turns in flight.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTiles:
    """Tiles of all attention kernels on one chip.

    Attributes:
        decode: One new token per sequence.
        prefill: Several.
        short_prefill: Several, when no sequence has more rows than this tile.
        prefix: Keys that several sequences share.
        num_decode_programs: Programs of ``decode`` that the chip holds at a time.
    """

    decode: Tile
    prefill: Tile
    short_prefill: Tile
    prefix: Tile
    num_decode_programs: int


def _tiles(
    decode: Tile, prefill: Tile, short_prefill: Tile, prefix: Tile, num_decode_programs: int
) -> AttentionTiles:
    return AttentionTiles(
        decode=decode,
        prefill=prefill,
        short_prefill=short_prefill,
        prefix=prefix,
        num_decode_programs=num_decode_programs,
    )


# Of Triton's interpreter, where a turn of the loop costs the same whatever its size.
_INTERPRETED = _tiles(
    Tile(16, 64, 4, 1), Tile(64, 64, 4, 1), Tile(16, 64, 4, 1), Tile(32, 64, 4, 1), 8
)

# By padded head_dim and bytes per stored number: tiles, and how many decode programs one
# multiprocessor holds. In flight per multiprocessor has to be what memory delivers in one latency,
# 27 KB on H200 (4.8 TB/s, 0.75 us, 132 of them).
_Table = dict[tuple[int, int], AttentionTiles]
# Hopper and data centre Blackwell have 227 KiB of shared memory and asynchronous products.
_LARGE: _Table = {
    (64, 2): _tiles(
        Tile(16, 128, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), 3
    ),
    (128, 2): _tiles(
        Tile(16, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), 3
    ),
    (256, 2): _tiles(
        Tile(16, 32, 8, 3), Tile(128, 32, 8, 3), Tile(64, 32, 8, 3), Tile(64, 32, 8, 3), 2
    ),
    (64, 1): _tiles(
        Tile(16, 64, 4, 5), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), 4
    ),
    (128, 1): _tiles(
        Tile(16, 32, 4, 5), Tile(128, 64, 8, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), 4
    ),
}
# Ampere, Ada and consumer Blackwell: products take registers, and the least of them have 99 KiB.
_SMALL: _Table = {
    (64, 2): _tiles(
        Tile(16, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), 2
    ),
    (128, 2): _tiles(
        Tile(16, 32, 4, 3), Tile(128, 32, 8, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), 2
    ),
    (256, 2): _tiles(
        Tile(16, 16, 4, 3), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), 2
    ),
    (64, 1): _tiles(
        Tile(16, 64, 4, 4), Tile(128, 32, 8, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), 3
    ),
    (128, 1): _tiles(
        Tile(16, 32, 4, 4), Tile(128, 32, 8, 3), Tile(64, 32, 8, 3), Tile(64, 32, 8, 3), 3
    ),
}


def attention_tiles(
    *,
    capability: int,
    num_processors: int,
    group_size: int,
    padded_dim: int,
    itemsize: int,
    dot_itemsize: int,
) -> AttentionTiles:
    """Tiles for one model on one chip, with heads no wider than the two limits above.

    Args:
        capability: Compute capability times ten; 0 for the interpreter.
        num_processors: Multiprocessors of the chip.
        group_size: Query heads per key head.
        padded_dim: Channels per head, rounded up to a power of two.
        itemsize: Bytes per stored number.
        dot_itemsize: Bytes per number in products.
    """
    if capability == 0:
        return _INTERPRETED
    table = _LARGE if capability // 10 in (9, 10) else _SMALL
    tiles = table[max(64, padded_dim), min(itemsize, 2)]
    if dot_itemsize == 4:
        # No tensor core takes float32 as it is, and registers hold half as many numbers.
        tile = Tile(16, 16, 4, 2)
        tiles = _tiles(tile, tile, tile, tile, 2)
    # A program takes the heads of one group, if they are not too many.
    rows = min(64, max(tiles.decode.rows, 1 << (group_size - 1).bit_length()))
    return replace(
        tiles,
        decode=replace(tiles.decode, rows=rows),
        num_decode_programs=tiles.num_decode_programs * num_processors,
    )
