"""Another number of blocks while requests run: compaction and change of size.

    before   [ a | . | b | . | c | d ]        to 4 blocks
    move       a   c   b   d                  blocks behind the new end go to free ones before it
    after    [ a | c | b | d ]                what was behind is returned to the system

Cached blocks are given up only as far as they would not fit. Tables, pins and the prefix index
follow; tokens do not change, because nothing but the place of a block has.
"""

import numpy as np

from pageframe.core.errors import (
    InvalidRequestError,
    OutOfRangeError,
    PreconditionError,
    UnavailableError,
)
from pageframe.core.trace import KvCause
from pageframe.core.units import ceil_div
from pageframe.executor.block_moves import Int64Array
from pageframe.executor.memory.block_columns import BlockState
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.pool_upkeep import relocate
from pageframe.executor.memory.purpose import Purpose


def check_resize(memory: KvMemory, num_blocks: int) -> None:
    """Refuse a size that the pool cannot have now; changes nothing.

    Raises:
        InvalidRequestError: RESIZE_TOO_SMALL.
        OutOfRangeError: RESIZE_ABOVE_RESERVED.
        PreconditionError: RESIZE_BELOW_PINNED, RESIZE_BELOW_HELD, RESIZE_BELOW_RUNNING, or
            QUOTA_FLOORS_EXCEED_POOL.
        UnavailableError: STEP_IN_FLIGHT.
    """
    pool = memory.pool
    if num_blocks < 1:
        raise InvalidRequestError(
            "RESIZE_TOO_SMALL", f"a pool of {num_blocks} blocks", num_blocks=num_blocks
        )
    if num_blocks > pool.num_blocks_max:
        raise OutOfRangeError(
            "RESIZE_ABOVE_RESERVED",
            f"{num_blocks} blocks were asked for, room was reserved for {pool.num_blocks_max}; "
            "start with a larger --num-blocks-max",
            num_blocks=num_blocks,
            num_blocks_max=pool.num_blocks_max,
        )
    if not pool.is_quiet:
        raise UnavailableError("STEP_IN_FLIGHT", "a step is in flight; try again")
    needs = (
        ("RESIZE_BELOW_PINNED", "are pinned", pool.num_pinned),
        ("RESIZE_BELOW_HELD", "are held", pool.num_held),
        ("RESIZE_BELOW_RUNNING", "may be needed by one sequence", _num_blocks_of_longest(memory)),
    )
    num_usable = _num_usable(memory, num_blocks)
    for reason, what, num_needed in needs:
        if num_needed > num_usable:
            raise PreconditionError(
                reason,
                f"{num_usable} usable blocks would be left, but {num_needed} {what}",
                num_blocks=num_blocks,
                num_usable_blocks=num_usable,
                num_needed_blocks=num_needed,
            )
    memory.quotas.check_total(num_blocks)


def plan_moves(memory: KvMemory, num_blocks: int) -> tuple[Int64Array, Int64Array]:
    """Which blocks behind ``num_blocks`` go where before it: sources and targets, int64 [n] each.

    ``check_resize`` was passed. Evicts what would not fit, and queues the copies; nothing refers to
    the targets until ``commit_moves``, so a copy that fails has changed nothing.
    """
    pool, columns = memory.pool, memory.pool.columns
    num_spare = pool.num_held + columns.num_by_state[BlockState.CACHED]
    num_too_many = num_spare - _num_usable(memory, num_blocks)
    pool.evict(max(0, num_too_many), Purpose(KvCause.RESIZE))
    behind: Int64Array = np.arange(num_blocks, pool.num_blocks, dtype=np.int64)
    states = columns.states[behind]
    sources = behind[(states == BlockState.HELD) | (states == BlockState.CACHED)]
    targets = pool.supply.lowest_free(len(sources), num_blocks)
    memory.transfers.copy(sources.tolist(), targets.tolist())
    return sources, targets


def commit_moves(memory: KvMemory, sources: Int64Array, targets: Int64Array) -> None:
    """The copies were made: tables, pins and the prefix index follow."""
    if not len(sources):
        return
    relocate(memory.pool, sources, targets, Purpose(KvCause.RESIZE))
    memory.tables.rename(sources, targets, memory.pool.num_blocks_max)
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        memory.retentions.move_block(source, target)


def _num_usable(memory: KvMemory, num_blocks: int) -> int:
    """Blocks of a pool of that size that are not in quarantine."""
    states = memory.pool.columns.states[:num_blocks]
    return num_blocks - int(np.count_nonzero(states == BlockState.QUARANTINED))


def _num_blocks_of_longest(memory: KvMemory) -> int:
    """Blocks that the longest known sequence may come to hold, alone."""
    longest = max(
        (
            sequence.num_prompt_tokens + sequence.sampling.max_tokens - 1
            for sequence in memory.sequences.all()
        ),
        default=0,
    )
    num_blocks = ceil_div(min(longest, memory.options.max_model_len), memory.options.block_size)
    return num_blocks * memory.options.num_groups
