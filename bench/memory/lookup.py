"""Keys of blocks, and the prefix index that finds blocks by them."""

import random

import numpy as np

from bench.memory.operations import (
    BLOCK_SIZE,
    NUM_BLOCKS_PER_TURN,
    ROOT,
    Turn,
    Watch,
    chains_of,
    operation,
    some_blocks,
    some_chains,
)
from pageframe.executor.memory.block_keys import chain_keys
from pageframe.executor.memory.prefix_index import PrefixIndex


def full_index(num_blocks: int) -> PrefixIndex:
    """Every block of the pool is indexed; as many ids as a turn takes stay over."""
    index = PrefixIndex(num_blocks + NUM_BLOCKS_PER_TURN, BLOCK_SIZE)
    for chain in chains_of(num_blocks):
        for block in chain:
            assert index.add(block.block_id, block.key, block.parent, block.token_ids)
    return index


@operation("keys of a chain")
def keys_of_chain(_num_blocks: int, _rng: random.Random) -> Turn:
    """The same work for either pool: a ratio that is far from one says how much others disturb."""
    tokens = np.arange(NUM_BLOCKS_PER_TURN * BLOCK_SIZE, dtype=np.int32)

    def turn(watch: Watch) -> int:
        with watch:
            keys = chain_keys(ROOT, tokens, BLOCK_SIZE)
        return len(keys)

    return turn


@operation("index: add")
def index_add(num_blocks: int, rng: random.Random) -> Turn:
    index = full_index(num_blocks)

    def turn(watch: Watch) -> int:
        blocks = some_blocks(num_blocks, rng)
        for block in blocks:
            index.remove(block.block_id)
        with watch:
            for block in blocks:
                index.add(block.block_id, block.key, block.parent, block.token_ids)
        return len(blocks)

    return turn


@operation("index: remove")
def index_remove(num_blocks: int, rng: random.Random) -> Turn:
    index = full_index(num_blocks)

    def turn(watch: Watch) -> int:
        blocks = some_blocks(num_blocks, rng)
        with watch:
            for block in blocks:
                index.remove(block.block_id)
        for block in blocks:
            index.add(block.block_id, block.key, block.parent, block.token_ids)
        return len(blocks)

    return turn


@operation("index: match")
def index_match(num_blocks: int, rng: random.Random) -> Turn:
    index = full_index(num_blocks)

    def turn(watch: Watch) -> int:
        chains = some_chains(num_blocks, rng)
        # A prompt brings keys of its own: equal ones, not the same objects.
        asked = [[bytes(bytearray(block.key)) for block in chain] for chain in chains]
        with watch:
            found = [index.match(keys) for keys in asked]
        assert found == [[block.block_id for block in chain] for chain in chains]
        return NUM_BLOCKS_PER_TURN

    return turn


@operation("index: match inside the only child")
def index_match_only_child(num_blocks: int, rng: random.Random) -> Turn:
    """Half of a block's tokens, below a parent that has no other child. Per question."""
    return _match_inside(num_blocks, rng, depth=1)


@operation("index: match inside 16 children")
def index_match_many_children(num_blocks: int, rng: random.Random) -> Turn:
    """The same below the root, where 16 of many children are looked at, mostly in vain."""
    return _match_inside(num_blocks, rng, depth=0)


def _match_inside(num_blocks: int, rng: random.Random, depth: int) -> Turn:
    index = full_index(num_blocks)

    def turn(watch: Watch) -> int:
        chains = rng.choices(chains_of(num_blocks), k=NUM_BLOCKS_PER_TURN)
        blocks = [chain[depth] for chain in chains]
        asked = [np.frombuffer(block.token_ids, dtype="<i4")[: BLOCK_SIZE // 2] for block in blocks]
        with watch:
            for block, tokens in zip(blocks, asked, strict=True):
                index.match_inside(block.parent, tokens)
        return len(blocks)

    return turn


@operation("index: move")
def index_move(num_blocks: int, rng: random.Random) -> Turn:
    index = full_index(num_blocks)

    def turn(watch: Watch) -> int:
        sources = [block.block_id for block in some_blocks(num_blocks, rng)]
        targets = range(num_blocks, num_blocks + len(sources))
        with watch:
            for source, target in zip(sources, targets, strict=True):
                index.move(source, target)
        for source, target in zip(sources, targets, strict=True):
            index.move(target, source)
        return len(sources)

    return turn
