"""What Triton attention works out on the host once per step and window size.

Everything is a table of small integers, and all of them go to the device in one copy:

    slots      sequences with one new token, those that share a prefix side by side
    prefixes   ranges of keys that neighbouring slots share
    chunks     tiles of rows of sequences with several new tokens, those with most keys first
    tables     block tables

How slots are cut into items is left to the device (``jit/split_plan.py``), so that a CUDA graph
which holds that kernel needs nothing from the host but these tables.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageframe.kernels.jit.attention_tiles import AttentionTiles

# Records, in 32-bit numbers; as the kernels of the same names read them.
SLOT_FIELDS = 5
ITEM_FIELDS = 8
MERGE_FIELDS = 4
CHUNK_FIELDS = 8
PREFIX_FIELDS = 8

# A result that must not depend on its batch is summed over items of so many keys.
FIXED_ITEM_KEYS = 512
# An item of fewer keys costs more to merge than it saves: 4 tiles of 64.
ITEM_KEYS_MIN = 256
# A shared prefix costs a launch and one partial result per sequence, about as much as reading
# this many keys of an 8B model's layer (4 KiB each, 5 us at 4 TB/s).
_SAVED_KEYS_MIN = 4096
_PREFIX_KEYS_MIN = 256

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Sizes of a plan's tables; a CUDA graph is captured with one of these.

    Attributes:
        num_slots: Sequences with one new token.
        num_items: Parts of their keys.
        num_partials: Partial results: of items, and of shared prefixes.
        num_prefixes: Ranges of shared keys, times tiles of rows.
        num_chunks: Tiles of rows of sequences with several new tokens.
        num_sequences: Sequences.
        table_width: Blocks per sequence.
    """

    num_slots: int
    num_items: int
    num_partials: int
    num_prefixes: int
    num_chunks: int
    num_sequences: int
    table_width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTables:
    """One step on the host.

    Attributes:
        slots: [SLOT_FIELDS, slots].
        prefixes: [prefixes, PREFIX_FIELDS].
        chunks: [chunks, CHUNK_FIELDS].
        tables: [sequences, width].
        num_shared_partials: Partial results of prefixes, over all slots.
        num_fixed_items: Items of slots, were they ``FIXED_ITEM_KEYS`` long.
        has_short_chunks: Whether chunks are tiles of ``short_prefill``.
    """

    slots: Ints
    prefixes: Ints
    chunks: Ints
    tables: Ints
    num_shared_partials: int
    num_fixed_items: int
    has_short_chunks: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlanner:
    """Fills tables.

    Attributes:
        block_size: Tokens per block.
        group_size: Query heads per key head.
        num_kv_heads: Key heads.
        tiles: Of the chip.
        is_deterministic: Whether a sequence's result may not depend on its batch: prefixes are
            not shared, and tiles are the same for all lengths.
    """

    block_size: int
    group_size: int
    num_kv_heads: int
    tiles: AttentionTiles
    is_deterministic: bool

    def step(
        self,
        *,
        query_start: Ints,
        context_lens: Ints,
        block_tables: Ints,
        window: int | None,
        may_be_short: bool = True,
    ) -> StepTables:
        """Tables of one step; arguments as in the reference of paged attention.

        Args:
            query_start: As there.
            context_lens: As there.
            block_tables: As there.
            window: As there.
            may_be_short: Whether chunks may be tiles of ``short_prefill``.
        """
        query_lens = np.diff(query_start).astype(np.int64)
        lens = context_lens.astype(np.int64)
        sequences = np.flatnonzero(query_lens == 1)
        first_keys = np.maximum(lens - window, 0) if window is not None else np.zeros_like(lens)
        prefixes: Ints = np.zeros((0, PREFIX_FIELDS), np.int32)
        num_shared = np.zeros(sequences.size, np.int64)
        has_room = self.group_size <= self.tiles.prefix.rows
        if window is None and has_room and not self.is_deterministic:
            sequences, prefix_keys, prefixes, num_shared = self._share(
                sequences, lens, block_tables
            )
            first_keys[sequences] = prefix_keys
        chunks, is_short = self._chunks(query_start, query_lens, lens, window, may_be_short)
        slot_lens = lens[sequences] - first_keys[sequences]
        return StepTables(
            slots=np.stack(
                [
                    query_start[:-1][sequences],
                    sequences,
                    first_keys[sequences],
                    lens[sequences],
                    num_shared,
                ]
            ).astype(np.int32),
            prefixes=prefixes,
            chunks=chunks,
            tables=block_tables,
            num_shared_partials=int(num_shared.sum()),
            num_fixed_items=int((-(-slot_lens // FIXED_ITEM_KEYS)).sum()),
            has_short_chunks=is_short,
        )

    def prefix_bounds(self, num_slots: int) -> tuple[int, int]:
        """Most prefixes, and most partial results of them, that so many slots can have.

        A group of m slots has t = ceil(m / slots per tile) tiles, and its k keys are cut into p
        parts of c keys, where p < k / c + 1. The sum of t * k is at most c times the programs of
        the chip, by the choice of c. So the sum of t * p, the prefixes, is below programs + sum of
        t; and the sum of m * p, the partial results, below slots per tile * programs + slots.
        """
        if num_slots < 2 or self.is_deterministic or self.group_size > self.tiles.prefix.rows:
            return 0, 0
        slots_per_tile, programs = self._slots_per_tile, self._prefix_programs
        # Groups are of two at least: one tile of each, and one more for what fills a tile.
        num_tiles = num_slots // 2 + num_slots // slots_per_tile + 1
        return programs + num_tiles, slots_per_tile * programs + num_slots

    @property
    def _slots_per_tile(self) -> int:
        return max(1, self.tiles.prefix.rows // self.group_size)

    @property
    def _prefix_programs(self) -> int:
        """Tiles of prefixes that the chip works on at a time."""
        return max(1, self.tiles.num_decode_programs // self.num_kv_heads)

    def _chunks(
        self,
        query_start: Ints,
        query_lens: NDArray[np.int64],
        lens: NDArray[np.int64],
        window: int | None,
        may_be_short: bool,
    ) -> tuple[Ints, bool]:
        """Tiles of rows, those with most keys first, and whether they are short ones."""
        sequences = np.flatnonzero(query_lens > 1)
        short_rows = self.tiles.short_prefill.rows
        is_short = may_be_short and not self.is_deterministic
        if not sequences.size:
            # A step of decodes alone is the usual one.
            return np.zeros((0, CHUNK_FIELDS), np.int32), is_short
        num_rows = query_lens[sequences] * self.group_size
        is_short = is_short and bool((num_rows <= short_rows).all())
        tile_rows = short_rows if is_short else self.tiles.prefill.rows
        num_tiles = -(-num_rows // tile_rows)
        owner = np.repeat(np.arange(sequences.size), num_tiles)
        tile = np.arange(owner.size) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
        first_rows = tile * tile_rows
        last_tokens = np.minimum(first_rows + tile_rows, num_rows[owner]) - 1
        last_tokens //= self.group_size
        tile_sequences = sequences[owner]
        num_keys = lens[tile_sequences] - query_lens[tile_sequences] + last_tokens + 1
        if window is not None:
            num_keys = np.minimum(num_keys, window + tile_rows // self.group_size)
        order = np.argsort(-num_keys, kind="stable")
        chunks = np.zeros((owner.size, CHUNK_FIELDS), np.int32)
        chunks[:, 0] = tile_sequences[order]
        chunks[:, 1] = query_start[:-1][tile_sequences[order]]
        chunks[:, 2] = query_lens[tile_sequences[order]]
        chunks[:, 3] = first_rows[order]
        chunks[:, 4] = lens[tile_sequences[order]]
        return chunks, is_short

    def _share(
        self, sequences: NDArray[np.intp], lens: NDArray[np.int64], block_tables: Ints
    ) -> tuple[NDArray[np.intp], NDArray[np.int64], Ints, NDArray[np.int64]]:
        """Find prefixes, and put sequences that share one side by side.

        Returns:
            Sequences in order of slots; the shared keys of each; items; the partials of each.
        """
        groups = self._groups(sequences, lens, block_tables)
        order = sequences
        if groups:
            grouped = np.concatenate([members for members, _ in groups])
            order = np.concatenate([grouped, np.setdiff1d(sequences, grouped)])
        prefix_keys = np.zeros(order.size, np.int64)
        num_shared = np.zeros(order.size, np.int64)
        # As many items as the chip holds programs, over all row tiles.
        slots_per_tile = self._slots_per_tile
        work = sum(-(-members.size // slots_per_tile) * num_keys for members, num_keys in groups)
        item_keys = -(-work // self._prefix_programs)
        item_keys = max(FIXED_ITEM_KEYS, _round_up(item_keys, self.tiles.prefix.keys))
        items = []
        first_slot = 0
        for members, num_keys in groups:
            end_slot = first_slot + members.size
            starts = range(0, num_keys, item_keys)
            prefix_keys[first_slot:end_slot] = num_keys
            num_shared[first_slot:end_slot] = len(starts)
            items += [
                (
                    members[0],
                    slot,
                    min(slots_per_tile, end_slot - slot),
                    start,
                    min(start + item_keys, num_keys),
                    part,
                    0,
                    0,
                )
                for part, start in enumerate(starts)
                for slot in range(first_slot, end_slot, slots_per_tile)
            ]
            first_slot = end_slot
        return order, prefix_keys, np.array(items, np.int32).reshape(-1, PREFIX_FIELDS), num_shared

    def _groups(
        self, sequences: NDArray[np.intp], lens: NDArray[np.int64], block_tables: Ints
    ) -> list[tuple[NDArray[np.intp], int]]:
        """Sequences whose tables begin alike, and how many keys that is; one level deep.

        A prefix is found by its block at the least depth that pays: who shares that one shares,
        in a prefix cache, all before it. What is shared is then compared, not believed.
        """
        depth = -(-_PREFIX_KEYS_MIN // self.block_size)
        deep = sequences[(lens[sequences] - 1) // self.block_size >= depth]
        if deep.size < 2:
            return []
        blocks = block_tables[deep, depth - 1]
        # Usually nobody shares, and a set says so a dozen times faster than sorting.
        if len(set(blocks.tolist())) == deep.size:
            return []
        _, group_of, sizes = np.unique(blocks, return_inverse=True, return_counts=True)
        groups = []
        for group in np.flatnonzero(sizes > 1):
            members = deep[group_of == group]
            # Not the block of the newest key: a slot has at least one key of its own.
            width = int((lens[members].min() - 1) // self.block_size)
            tables = block_tables[members, :width]
            differs = (tables != tables[0]).any(axis=0)
            num_blocks = int(differs.argmax()) if differs.any() else width
            num_keys = num_blocks * self.block_size
            saved_keys = num_keys * (members.size - 1)
            if num_keys >= _PREFIX_KEYS_MIN and saved_keys >= _SAVED_KEYS_MIN:
                groups.append((members, num_keys))
        return groups


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
