"""What the pool and the block tables cost: allocate, free, share, fork, copy-on-write, publish.

The pool is nearly full of cached prefixes, as it is after some minutes of serving, and the blocks
that a turn works with are taken from it. Figures are per block; for copy-on-write per copy, with
all that belongs to one: a new block, the copy noted for the runner, a reference dropped.
"""

import random

import numpy as np

from bench.memory.operations import (
    BLOCK_SIZE,
    CHAIN_LENGTH,
    Turn,
    Watch,
    operation,
)
from pageframe.core.plan import Announcement
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import KvCause, NullTraceSink
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.matching import Match
from pageframe.executor.memory.options import MemoryOptions
from pageframe.executor.memory.publishing import publish
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.sequence_table import Sequence
from pageframe.executor.memory.sharing import fork, make_writable
from pageframe.executor.memory.yielding import build_memory

NUM_TOKENS = CHAIN_LENGTH * BLOCK_SIZE
# As many as the samples of one request may be.
NUM_CHILDREN = 64
_FREE_BLOCKS = 4 * CHAIN_LENGTH + NUM_CHILDREN
_PURPOSE = Purpose(KvCause.PREFILL, 1)


def full_memory(num_blocks: int) -> KvMemory:
    """Cached prefixes everywhere but in a few blocks."""
    memory = build_memory(
        MemoryOptions(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_sequences=NUM_CHILDREN + 2,
            max_model_len=2 * NUM_TOKENS,
        ),
        trace=NullTraceSink(),
    )
    rng = np.random.default_rng(1)
    while memory.pool.num_free > _FREE_BLOCKS + CHAIN_LENGTH:
        sequence = run(memory, rng.integers(0, 50_000, NUM_TOKENS).tolist())
        publish(memory, np.array([sequence.row], dtype=np.int64))
        memory.forget(sequence, KvCause.FINISHED)
    return memory


def run(memory: KvMemory, tokens: list[int]) -> Sequence:
    """A sequence whose tokens are all computed, and nothing of it found."""
    sequence = memory.announce(
        Announcement(
            sequence_id=1,
            token_ids=tokens,
            num_prompt_tokens=len(tokens),
            sampling=SamplingParams(),
        )
    )
    memory.seat(sequence, Match())
    memory.cover(sequence.row, len(tokens))
    memory.sequences.num_computed[sequence.row] = len(tokens)
    return sequence


@operation("pool: allocate")
def pool_allocate(num_blocks: int, _rng: random.Random) -> Turn:
    pool = full_memory(num_blocks).pool

    def turn(watch: Watch) -> int:
        with watch:
            block_ids = pool.allocate(CHAIN_LENGTH, _PURPOSE)
        pool.release(block_ids, _PURPOSE)
        return CHAIN_LENGTH

    return turn


@operation("pool: free")
def pool_free(num_blocks: int, _rng: random.Random) -> Turn:
    pool = full_memory(num_blocks).pool

    def turn(watch: Watch) -> int:
        block_ids = pool.allocate(CHAIN_LENGTH, _PURPOSE)
        with watch:
            pool.release(block_ids, _PURPOSE)
        return CHAIN_LENGTH

    return turn


@operation("prefix: match and share")
def match_and_share(num_blocks: int, rng: random.Random) -> Turn:
    """An admission that finds all its blocks, keys included."""
    memory = full_memory(num_blocks)
    tokens = [rng.randrange(50_000) for _ in range(NUM_TOKENS)]
    first = run(memory, tokens)
    publish(memory, np.array([first.row], dtype=np.int64))
    memory.forget(first, KvCause.FINISHED)

    def turn(watch: Watch) -> int:
        sequence = memory.announce(
            Announcement(
                sequence_id=1,
                token_ids=[*tokens, 1, 2],
                num_prompt_tokens=NUM_TOKENS + 2,
                sampling=SamplingParams(),
            )
        )
        with watch:
            memory.seat(sequence, memory.match(sequence))
        memory.forget(sequence, KvCause.FINISHED)
        return CHAIN_LENGTH

    return turn


@operation("prefix: publish")
def publish_chain(num_blocks: int, rng: random.Random) -> Turn:
    """Blocks that became full, keys included; one sequence with many."""
    memory = full_memory(num_blocks)

    def turn(watch: Watch) -> int:
        sequence = run(memory, [rng.randrange(50_000) for _ in range(NUM_TOKENS)])
        rows = np.array([sequence.row], dtype=np.int64)
        with watch:
            publish(memory, rows)
        memory.pool.unpublish(memory.tables.blocks_of(sequence.row), _PURPOSE)
        memory.forget(sequence, KvCause.FINISHED)
        return CHAIN_LENGTH

    return turn


@operation("fork")
def fork_chain(num_blocks: int, rng: random.Random) -> Turn:
    """One child of a sequence of 50 blocks."""
    memory = full_memory(num_blocks)
    parent = run(memory, [rng.randrange(50_000) for _ in range(NUM_TOKENS)])

    def turn(watch: Watch) -> int:
        with watch:
            child = fork(memory, parent, 2, 1, b"")
        memory.forget(child, KvCause.FINISHED)
        return CHAIN_LENGTH

    return turn


@operation("copy-on-write, 64 in a step")
def copy_on_write_by_many(num_blocks: int, rng: random.Random) -> Turn:
    """64 children write into the block that they share, in one step; per copy."""
    return _copy_on_write(num_blocks, rng, NUM_CHILDREN)


@operation("copy-on-write, 8 in a step")
def copy_on_write_by_few(num_blocks: int, rng: random.Random) -> Turn:
    """The same of 8 children."""
    return _copy_on_write(num_blocks, rng, 8)


def _copy_on_write(num_blocks: int, rng: random.Random, num_children: int) -> Turn:
    memory = full_memory(num_blocks)
    parent = run(memory, [rng.randrange(50_000) for _ in range(NUM_TOKENS)])
    memory.sequences.num_computed[parent.row] = NUM_TOKENS - 3

    def turn(watch: Watch) -> int:
        children = [fork(memory, parent, 2 + index, index, b"") for index in range(num_children)]
        rows = np.array([child.row for child in children], dtype=np.int64)
        with watch:
            make_writable(memory, rows, KvCause.DECODE)
        memory.transfers.take()
        for child in children:
            memory.forget(child, KvCause.FINISHED)
        return num_children

    return turn
