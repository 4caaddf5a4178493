"""Keys that several sequences share are taken in once, and nobody's bits tell with whom."""

import numpy as np
import pytest
import torch

from pageframe.kernels.cpu.attention import CpuParts, SharedTile
from pageframe.kernels.cpu.library import CpuLibrary
from pageframe.kernels.cpu.model import KV_DTYPES
from unit.kernels.cpu.libraries import USABLE, loaded, parts_of
from unit.kernels.pools import garbage_pool

_SCALE = 0.3
_MIDDLE = 1
_HEADS = (9, 3, 64)
# Few enough for tables that can be read at a glance.
_MIN_KEYS = 64
# Nothing may follow this entry of a table.
_OUTSIDE = 2**31 - 1


@pytest.fixture(scope="module", params=USABLE)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    return loaded(request.param)


@pytest.fixture(scope="module")
def planner() -> CpuParts:
    """For plans alone: no key is ever read."""
    return _parts(loaded(USABLE[-1]), garbage_pool(1, 16, 3, 64, torch.bfloat16))


def _parts(library, pool, min_shared_keys=_MIN_KEYS):
    return parts_of(library, pool, _MIDDLE, min_shared_keys)


def _tiles(planner, tables, contexts, *, new=None, num_heads=9, **options):
    new = [1] * len(tables) if new is None else new
    width = max(map(len, tables))
    entries = [[*table, *[_OUTSIDE] * (width - len(table))] for table in tables]
    return planner.shared_tiles(
        query_start=np.cumsum([0, *new]).astype(np.int32),
        context_lens=np.array(contexts, np.int32),
        block_tables=np.array(entries, np.int32),
        num_heads=num_heads,
        **options,
    )


def test_blocks_that_two_sequences_share_are_one_tile_whoever_stands_between_them(planner):
    tables = [[7, 3, 9, 5, 1], [2, 0, 6, 8, 4], [7, 3, 9, 5, 10]]
    assert _tiles(planner, tables, [70, 70, 75]) == [SharedTile((0, 64), (0, 3), (0, 2))]


@pytest.mark.parametrize(
    ("num_shared", "keys"), [(3, None), (4, (0, 64)), (5, (0, 64)), (6, (0, 96))]
)
def test_only_whole_tiles_of_keys_are_shared_and_at_least_two(planner, num_shared, keys):
    tables = [[*range(num_shared), 20, 21], [*range(num_shared), 30, 31]]
    tiles = _tiles(planner, tables, [num_shared * 16 + 20] * 2)
    assert [tile.keys for tile in tiles] == ([] if keys is None else [keys])


def test_a_model_lets_sequences_share_what_is_too_much_for_a_cache():
    planner = _parts(loaded(USABLE[-1]), garbage_pool(1, 16, 3, 64, torch.bfloat16), 0)
    for num_shared, keys in ((31, []), (32, [(0, 512)])):
        tables = [[*range(num_shared), 50], [*range(num_shared), 51]]
        tiles = _tiles(planner, tables, [num_shared * 16 + 10] * 2)
        assert [tile.keys for tile in tiles] == keys


def test_a_tile_of_shared_keys_ends_with_a_split(planner):
    tables = [[*range(40), 50], [*range(40), 51]]
    assert [tile.keys for tile in _tiles(planner, tables, [650, 650])] == [(0, 512), (512, 640)]


def test_what_saves_most_is_shared(planner):
    begin = list(range(4))
    pairs = [[*begin, *range(first, first + 4)] for first in (10, 10, 20, 20)]
    tables = [[*table, 30 + place] for place, table in enumerate(pairs)]
    # 128 keys by two of two each, or 64 keys by four.
    assert _tiles(planner, tables, [130] * 4) == [
        SharedTile((0, 128), (0, 3), (0, 1)),
        SharedTile((0, 128), (0, 3), (2, 3)),
    ]
    # 96 keys by two, or 64 by four.
    tables = [[*begin, 10, 11, 30], [*begin, 10, 11, 31], [*begin, 12, 13], [*begin, 14, 15]]
    (tile,) = _tiles(planner, tables, [97, 97, 90, 90])
    assert tile.keys == (0, 64)
    assert sorted(tile.tokens) == [0, 1, 2, 3]


def test_keys_behind_a_new_token_are_not_shared(planner):
    # As if both wrote to the same blocks: their own tokens are at 64 and 97.
    tables = [list(range(7)), list(range(7))]
    assert [tile.keys for tile in _tiles(planner, tables, [65, 98])] == [(0, 64)]
    assert _tiles(planner, tables, [64, 98]) == []


def test_all_new_tokens_of_a_sequence_share_unless_they_are_many(planner):
    tables = [[0, 1, 2, 3, 5], [0, 1, 2, 3, 6], [0, 1, 2, 3, 7]]
    (tile,) = _tiles(planner, tables, [68, 67, 73], new=[3, 2, 9])
    assert tile.tokens in ((0, 1, 2, 3, 4), (3, 4, 0, 1, 2))


def test_sequences_whose_windows_begin_elsewhere_share_nothing(planner):
    tables = [[*range(8), 10], [*range(8), 11], [*range(8), 12]]
    tiles = _tiles(planner, tables, [136, 137, 136], window=110)
    assert tiles == [SharedTile((26, 128), (0, 3), (0, 2))]
    # Two new tokens see different keys by themselves.
    assert _tiles(planner, tables, [136, 137, 136], new=[2, 2, 2], window=110) == []


def test_blocks_that_a_window_has_left_need_not_be_there(planner):
    tables = [[_OUTSIDE, *range(1, 8), 10], [5000, *range(1, 8), 11]]
    assert [tile.keys for tile in _tiles(planner, tables, [136, 136], window=110)] == [(26, 128)]
    assert _tiles(planner, tables, [136, 136]) == []


def test_tables_of_all_groups_of_layers_have_to_agree(planner):
    # Two groups take turns; the second one shares 4 blocks only.
    tables = np.zeros((2, 9, 2), np.int32)
    tables[:, :, 0] = [[*range(8), 20], [*range(8), 21]]
    tables[:, :, 1] = [[*range(30, 34), 40, 41, 42, 43, 44], [*range(30, 34), 50, 51, 52, 53, 54]]
    entries = tables.reshape(2, 18).tolist()
    found = {
        group: [t.keys for t in _tiles(planner, entries, [130] * 2, group=group, num_groups=2)]
        for group in (0, 1, None)
    }
    assert found == {0: [(0, 128)], 1: [(0, 64)], None: [(0, 64)]}


# Rows of 32 tokens at most; a thread should have four tiles, and a tile eight tokens.
@pytest.mark.parametrize(
    ("num_threads", "sizes"), [(1, [20, 20]), (2, [13, 13, 14]), (8, [8, 8, 8, 8, 8])]
)
def test_large_groups_are_cut_so_that_threads_have_enough(planner, num_threads, sizes):
    tables = [[0, 1, 2, 3, 10 + place] for place in range(40)]
    tiles = _tiles(planner, tables, [70] * 40, num_threads=num_threads)
    for head in range(3):
        tokens = [tile.tokens for tile in tiles if tile.heads == (head, head + 1)]
        assert [len(part) for part in tokens] == sizes
        assert sorted(token for part in tokens for token in part) == list(range(40))


class Crowd:
    """Sequences of several groups in random order; in each group they share a random prefix."""

    def __init__(self, library, dtype, *, block_size=16, heads=_HEADS, window=None, seed=0):
        print("seed", seed)
        rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        self.window = window
        free = iter(rng.permutation(700).tolist())
        width = 1300 // block_size + 3
        tables, contexts, new = [], [], []
        for num_members, num_shared in ((3, 560), (2, 70), (9, 200), (1, 90), (2, 1090)):
            shared = [next(free) for _ in range(num_shared // block_size)]
            # The first one branches off once more.
            branch = [*shared[: len(shared) // 2], next(free), next(free)]
            own = int(rng.integers(1, 60))
            for member in range(num_members + 1):
                blocks = branch if member == num_members else shared
                # Under a window only those at one place see the same.
                length = len(blocks) * block_size + (own if window else int(rng.integers(1, 90)))
                num_blocks = -(-length // block_size)
                tables.append([*blocks, *(next(free) for _ in range(num_blocks - len(blocks)))])
                contexts.append(length)
                most = 1 if window else 4
                new.append(min(int(rng.integers(1, most + 1)), length - len(blocks) * block_size))
        order = rng.permutation(len(tables))
        self.new = np.array(new)[order]
        self.contexts = np.array(contexts, np.int32)[order]
        self.tables = np.full((len(tables), width), _OUTSIDE, np.int32)
        for place, sequence in enumerate(order):
            self.tables[place, : len(tables[sequence])] = tables[sequence]
        self.starts = np.cumsum([0, *self.new]).astype(np.int32)
        num_heads, num_kv_heads, head_dim = heads
        self.query = torch.randn(int(self.starts[-1]), num_heads, head_dim, generator=generator)
        self.pool = garbage_pool(700, block_size, num_kv_heads, head_dim, dtype)
        self.parts = _parts(library, self.pool)
        slots = np.arange(700 * block_size, dtype=np.int64)
        for side in (0, 1):
            channels = torch.randn(len(slots), num_kv_heads, head_dim, generator=generator)
            self.parts.write(side, slots, channels)
        self.library = library

    def run(self, num_threads=1, only=None):
        sequences = np.arange(len(self.new)) if only is None else np.array(only)
        spans = [range(self.starts[s], self.starts[s + 1]) for s in sequences]
        threads = self.library.create_pool(num_threads)
        mixed = self.parts.attend(
            threads,
            self.query[[token for span in spans for token in span]],
            query_start=np.cumsum([0, *map(len, spans)]).astype(np.int32),
            context_lens=self.contexts[sequences],
            block_tables=np.ascontiguousarray(self.tables[sequences]),
            scale=_SCALE,
            window=self.window,
        )
        threads.close()
        return mixed

    def shared_tokens(self):
        """Tokens for which a tile is taken in together with others."""
        tiles = self.parts.shared_tiles(
            query_start=self.starts,
            context_lens=self.contexts,
            block_tables=self.tables,
            num_heads=self.query.shape[1],
            window=self.window,
        )
        return {token for tile in tiles for token in tile.tokens}


def _check(crowd, at_least, num_threads=(1, 3)):
    assert len(crowd.shared_tokens()) >= at_least
    alone = torch.cat([crowd.run(only=[sequence]) for sequence in range(len(crowd.new))])
    assert alone.isfinite().all()
    for count in num_threads:
        assert torch.equal(crowd.run(count), alone), f"{count} threads"


@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_sequence_has_the_same_bits_alone_and_among_those_who_share(library, dtype, seed):
    _check(Crowd(library, dtype, seed=seed), 15)


@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 8), (6, 2, 24), (8, 1, 128)], ids=str)
def test_sharing_changes_no_bit_whatever_the_heads(library, dtype, heads):
    _check(Crowd(library, dtype, heads=heads, seed=7), 15, (2,))


@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [8, 24, 48])
def test_sharing_changes_no_bit_whatever_the_size_of_blocks(library, dtype, block_size):
    _check(Crowd(library, dtype, block_size=block_size, seed=11), 12, (1,))


@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("window", [150, 530, 700])
def test_sharing_changes_no_bit_under_a_window(library, dtype, window):
    _check(Crowd(library, dtype, window=window, seed=13), 8)


def test_how_many_share_changes_no_bit(library):
    crowd = Crowd(library, torch.bfloat16, seed=17)
    whole = crowd.run()
    by_first_block: dict[int, list[int]] = {}
    for sequence, first in enumerate(crowd.tables[:, 0].tolist()):
        by_first_block.setdefault(first, []).append(sequence)
    largest = max(by_first_block.values(), key=len)
    for count in range(1, len(largest) + 1):
        chosen = largest[:count]
        expected = [whole[crowd.starts[s] : crowd.starts[s + 1]] for s in chosen]
        assert torch.equal(crowd.run(only=chosen), torch.cat(expected)), f"{count} of them"
