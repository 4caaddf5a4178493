"""The table of operations to measure, and what most of them start from: a pool full of chains.

An operation is one function under ``@operation``. It gets the number of blocks and a generator of
random numbers, makes what it needs, and returns its *turn*: a function that does the work with the
watch running, puts everything back with the watch stopped, and returns how many blocks that were.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from pageframe.executor.memory.block_keys import BlockKey, chain_keys, chain_root, token_bytes

BLOCK_SIZE = 16
# A conversation of 800 tokens. It divides the sizes of both pools.
CHAIN_LENGTH = 50
NUM_CHAINS_PER_TURN = 10
NUM_BLOCKS_PER_TURN = CHAIN_LENGTH * NUM_CHAINS_PER_TURN
ROOT = chain_root(model="bench", block_size=BLOCK_SIZE, salt=b"")


class Watch:
    """Sums up the time between entering and leaving it."""

    def __init__(self) -> None:
        self.elapsed_ns = 0
        self._started_ns = 0

    def __enter__(self) -> None:
        self._started_ns = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self.elapsed_ns += time.perf_counter_ns() - self._started_ns


Turn = Callable[[Watch], int]
Operation = Callable[[int, random.Random], Turn]

OPERATIONS: dict[str, Operation] = {}


def operation(name: str) -> Callable[[Operation], Operation]:
    """Enter a function into the table of operations."""

    def enter(function: Operation) -> Operation:
        assert name not in OPERATIONS, name
        OPERATIONS[name] = function
        return function

    return enter


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a chain and all that the prefix index is told of it."""

    block_id: int
    depth: int
    key: BlockKey
    parent: BlockKey
    token_ids: bytes


Chain = list[Block]


@cache
def chains_of(num_blocks: int) -> list[Chain]:
    """A pool full of conversations under one root; their blocks lie anywhere."""
    rng = np.random.default_rng(0)
    block_ids = rng.permutation(num_blocks).tolist()
    chains = []
    for start in range(0, num_blocks, CHAIN_LENGTH):
        tokens = rng.integers(0, 50_000, CHAIN_LENGTH * BLOCK_SIZE, dtype=np.int32)
        keys = chain_keys(ROOT, tokens, BLOCK_SIZE)
        columns = (
            block_ids[start : start + CHAIN_LENGTH],
            range(CHAIN_LENGTH),
            keys,
            [ROOT, *keys[:-1]],
            [token_bytes(held) for held in tokens.reshape(CHAIN_LENGTH, BLOCK_SIZE)],
        )
        chains.append([Block(*row) for row in zip(*columns, strict=True)])
    return chains


def some_chains(num_blocks: int, rng: random.Random) -> list[Chain]:
    """As many chains as one turn takes, ``NUM_BLOCKS_PER_TURN`` blocks."""
    return rng.sample(chains_of(num_blocks), NUM_CHAINS_PER_TURN)


def some_blocks(num_blocks: int, rng: random.Random) -> list[Block]:
    """The blocks of some chains, chain after chain, heads first."""
    return [block for chain in some_chains(num_blocks, rng) for block in chain]
