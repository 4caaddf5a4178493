"""The memories that a soak puts to the test: every block size with every pool and host tier.

First all of them with one group of layers, then with two, with three, and again.

A *life* is one memory from its first operation to its last. All that is random in it comes from the
seed and its number, so one life can be lived again alone.
"""

import random
from itertools import product
from typing import Final, NamedTuple

from bench.soak.shape import Shape

BLOCK_SIZES: Final = (1, 16, 128)
POOLS: Final = (3, 7, 40, 300, 10_000)
HOST_TIERS: Final = ("none", "small", "large")
_NUM_GROUPS_MAX: Final = 3
NUM_COMBINATIONS: Final = len(BLOCK_SIZES) * len(POOLS) * len(HOST_TIERS)

_COMBINATIONS: Final = tuple(product(HOST_TIERS, POOLS, BLOCK_SIZES))
# Longer sequences than this add time and no new cases.
_NUM_TOKENS_MAX: Final = 1_500


class Life(NamedTuple):
    """One memory, and how long to test it.

    Attributes:
        number: Which life; with the seed, it stands for everything random in it.
        num_operations: How many changes to ask for.
    """

    number: int
    num_operations: int


def lives_of(num_operations: int, num_operations_per_life: int) -> list[Life]:
    """Spread operations over lives, at least one for each combination of sizes."""
    num_lives = max(NUM_COMBINATIONS, -(-num_operations // num_operations_per_life))
    bounds = [num_operations * number // num_lives for number in range(num_lives + 1)]
    return [Life(number, bounds[number + 1] - bounds[number]) for number in range(num_lives)]


def random_of(seed: int, number: int) -> random.Random:
    """Where all that is random in a life comes from."""
    return random.Random(f"soak {seed} {number}")


def shape_of(number: int, source: random.Random) -> Shape:
    """The sizes of a life: the combination by its number, the rest at random."""
    host_tier, num_blocks, block_size = _COMBINATIONS[number % NUM_COMBINATIONS]
    num_slots = {"none": 0, "small": min(5, num_blocks), "large": 2 * min(num_blocks, 1_000)}
    has_prefix_cache = source.random() < 0.9
    num_groups = number // NUM_COMBINATIONS % _NUM_GROUPS_MAX + 1
    num_tokens_max = min(num_blocks // num_groups * block_size, _NUM_TOKENS_MAX)
    has_window = source.random() < 0.15
    window_max = 3 * block_size + 1
    group_windows = (
        tuple(source.choice([0, source.randint(2, window_max)]) for _ in range(num_groups))
        if num_groups > 1
        else ()
    )
    return Shape(
        num_blocks=num_blocks,
        block_size=block_size,
        num_rows=5 if num_blocks <= 40 else 12,
        max_step_tokens=max(40, 4 * block_size),
        max_model_len=num_tokens_max + 1,
        num_blocks_max=num_blocks + source.choice([0, num_blocks // 2 + 1]),
        num_host_slots=num_slots[host_tier],
        window_tokens=source.randint(2, window_max) if has_window and not group_windows else 0,
        group_windows=group_windows,
        has_prefix_cache=has_prefix_cache,
        eviction=source.choice(["lru", "cost-aware"]),
        session_idle_ns=source.choice([0, 40]),
        session_ttl_ns=source.choice([0, 150]) if has_prefix_cache else 0,
    )
