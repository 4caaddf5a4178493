"""Eviction policies: each operation once for each policy."""

import random
from functools import partial

from bench.memory.operations import (
    NUM_BLOCKS_PER_TURN,
    Chain,
    Turn,
    Watch,
    chains_of,
    operation,
    some_blocks,
    some_chains,
)
from pageframe.executor.memory.eviction import EvictionPolicy, load_eviction_policy

# A step evicts a few blocks at a time.
NUM_VICTIMS_PER_CALL = 10


def insert_chains(policy: EvictionPolicy, chains: list[Chain]) -> None:
    """Put chains in, one call each."""
    for chain in chains:
        policy.insert([block.block_id for block in chain], [block.depth for block in chain])


def full_policy(name: str, num_blocks: int) -> EvictionPolicy:
    """Every block of the pool is inside."""
    policy = load_eviction_policy(name)
    insert_chains(policy, chains_of(num_blocks))
    return policy


def insert(name: str, num_blocks: int, rng: random.Random) -> Turn:
    """Whole chains come back after a hit."""
    policy = full_policy(name, num_blocks)

    def turn(watch: Watch) -> int:
        chains = some_chains(num_blocks, rng)
        for chain in chains:
            for block in chain:
                policy.discard(block.block_id)
        with watch:
            insert_chains(policy, chains)
        return NUM_BLOCKS_PER_TURN

    return turn


def discard(name: str, num_blocks: int, rng: random.Random) -> Turn:
    """Whole chains are taken up again."""
    policy = full_policy(name, num_blocks)

    def turn(watch: Watch) -> int:
        chains = some_chains(num_blocks, rng)
        block_ids = [block.block_id for chain in chains for block in chain]
        with watch:
            for block_id in block_ids:
                policy.discard(block_id)
        insert_chains(policy, chains)
        return len(block_ids)

    return turn


def take(name: str, num_blocks: int, rng: random.Random) -> Turn:
    """Few victims a call, many calls; then as many chains come in as went."""
    policy = full_policy(name, num_blocks)
    chain_of = {block.block_id: chain for chain in chains_of(num_blocks) for block in chain}

    def turn(watch: Watch) -> int:
        # Some chains are needed again first, so that the victims are not the last ones in order.
        chains = some_chains(num_blocks, rng)
        for chain in chains:
            for block in chain:
                policy.discard(block.block_id)
        insert_chains(policy, chains)
        victims: list[int] = []
        with watch:
            for _ in range(NUM_BLOCKS_PER_TURN // NUM_VICTIMS_PER_CALL):
                victims += policy.take(NUM_VICTIMS_PER_CALL)
        gone = set(victims)
        for chain in {id(chain_of[victim]): chain_of[victim] for victim in victims}.values():
            insert_chains(policy, [[block for block in chain if block.block_id in gone]])
        return len(victims)

    return turn


def upcoming(name: str, num_blocks: int, _rng: random.Random) -> Turn:
    """What ``take`` would return, few at a time."""
    policy = full_policy(name, num_blocks)

    def turn(watch: Watch) -> int:
        num_calls = NUM_BLOCKS_PER_TURN // NUM_VICTIMS_PER_CALL
        with watch:
            for _ in range(num_calls):
                policy.upcoming(NUM_VICTIMS_PER_CALL)
        return num_calls * NUM_VICTIMS_PER_CALL

    return turn


def move(name: str, num_blocks: int, rng: random.Random) -> Turn:
    """Cached blocks are moved to other places."""
    policy = full_policy(name, num_blocks)

    def turn(watch: Watch) -> int:
        sources = [block.block_id for block in some_blocks(num_blocks, rng)]
        targets = range(num_blocks, num_blocks + len(sources))
        with watch:
            for source, target in zip(sources, targets, strict=True):
                policy.move(source, target)
        for source, target in zip(sources, targets, strict=True):
            policy.move(target, source)
        return len(sources)

    return turn


for _policy in ("lru", "cost-aware"):
    for _function in (insert, discard, take, upcoming, move):
        operation(f"{_policy}: {_function.__name__}")(partial(_function, _policy))
