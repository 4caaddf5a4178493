"""Rare changes of the pool as a whole: blocks that move, another size, blocks that are lost."""

import numpy as np

from pageframe.core.trace import KvCause, KvOperation
from pageframe.executor.block_moves import Int64Array
from pageframe.executor.memory.block_columns import BlockState
from pageframe.executor.memory.block_pool import BlockPool
from pageframe.executor.memory.purpose import Purpose

_NUM_BLOCKS_PER_RECORD_MAX = 8192


def relocate(pool: BlockPool, sources: Int64Array, targets: Int64Array, purpose: Purpose) -> None:
    """Held or cached blocks were copied to free ones; both int64 [n].

    Tables and pins have to follow; the sources are on the free list then.
    """
    is_indexed = pool.index.is_indexed[sources]
    pool.supply.swap_places(sources, targets)
    for source, target in zip(
        sources[is_indexed].tolist(), targets[is_indexed].tolist(), strict=True
    ):
        pool.index.move(source, target)
    pool.recorder.record(KvOperation.MOVE, purpose, sources.tolist(), targets.tolist())


def set_size(pool: BlockPool, num_blocks: int, purpose: Purpose) -> None:
    """Let the pool end at ``num_blocks``; what lies behind that must be free or broken."""
    low, high = sorted((num_blocks, pool.num_blocks))
    changed: Int64Array = np.arange(low, high, dtype=np.int64)
    is_growing = num_blocks > pool.num_blocks
    (pool.supply.open if is_growing else pool.supply.close)(changed)
    pool.num_blocks = num_blocks
    pool.columns.recount()
    _record_resize(pool, changed.tolist(), purpose, is_growing=is_growing)


def record_size(pool: BlockPool) -> None:
    """Record that the blocks of a new pool came into being: its trace begins with nothing."""
    _record_resize(pool, list(range(pool.num_blocks)), Purpose(KvCause.RESIZE), is_growing=True)


def _record_resize(
    pool: BlockPool, block_ids: list[int], purpose: Purpose, *, is_growing: bool
) -> None:
    # In parts: one record that names a million blocks would fit into no message.
    for start in range(0, len(block_ids), _NUM_BLOCKS_PER_RECORD_MAX):
        part = block_ids[start : start + _NUM_BLOCKS_PER_RECORD_MAX]
        removed, added = ([], part) if is_growing else (part, [])
        pool.recorder.record(KvOperation.RESIZE, purpose, removed, added)


def quarantine(pool: BlockPool, block_ids: Int64Array, purpose: Purpose) -> None:
    """Take blocks out of use for good, whatever place or places they were found in."""
    columns = pool.columns
    columns.check_known(block_ids, pool.num_blocks)
    block_ids = np.unique(block_ids[columns.states[block_ids] != BlockState.QUARANTINED])
    if not len(block_ids):
        return
    for block_id in block_ids[pool.index.is_indexed[block_ids]].tolist():
        pool.index.expel(block_id)
    pool.supply.discard(block_ids)
    columns.states[block_ids] = BlockState.QUARANTINED
    columns.ref_counts[block_ids] = 0
    columns.pin_counts[block_ids] = columns.idle_pin_counts[block_ids] = 0
    columns.causes[block_ids] = purpose.cause
    columns.since_steps[block_ids] = pool.current_step
    columns.recount()
    pool.recorder.record(KvOperation.QUARANTINE, purpose, block_ids.tolist())
