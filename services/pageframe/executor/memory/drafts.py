"""Room for drafts: tokens behind a sequence's newest one, of which not all will stay.

    block          0               1               2
    before     [ computed · · · | · · newest _ ]
    the step   [ · · · · · · ·  | · · newest d0 ][ d1 d2 _ _ ]      a block for d1 and d2
    d0 is kept [ · · · · · · ·  | · · · · · · d0 ]                  and back it goes, unindexed

A block beyond the last that is needed holds nothing but what was rejected, so it is given back in
the same step, before blocks are published. What was rejected inside a block that stays is written
over: its place is that of the tokens that come next, and no block is indexed before it is full.
"""

import numpy as np
from numpy.typing import NDArray

from pageframe.core.trace import KvCause
from pageframe.core.units import ceil_div
from pageframe.executor.memory.kv_memory import KvMemory


def cover_drafts(
    memory: KvMemory, row: int, num_drafts: int, num_blocks_max: int
) -> tuple[int, int]:
    """Give ``row``, which has the block of its newest token, room for drafts behind it.

    Nobody gives way for them, and no tenant passes its ceiling for them.

    Args:
        memory: Changed.
        row: Caught up.
        num_drafts: How many tokens are wanted.
        num_blocks_max: Most blocks to take.

    Returns:
        For how many tokens there is room now, at most ``num_drafts``, and how many blocks it took.
    """
    tables = memory.tables
    num_tokens = int(memory.sequences.num_computed[row]) + 1
    num_logical = num_blocks_max // tables.num_groups
    num_places = (int(tables.num_blocks[row]) // tables.num_groups) * tables.block_size - num_tokens
    wanted = min(num_drafts, num_places + num_logical * tables.block_size)
    num_missing = tables.num_missing(row, num_tokens + wanted)
    if not num_missing:
        return wanted, 0
    tenant_id = int(memory.sequences.tenant_ids[row])
    if memory.obstacle(tenant_id, num_missing) is not None:
        return min(wanted, num_places), 0
    purpose = memory.purpose_of(memory.sequences.at_row(row), KvCause.DRAFT)
    tables.append(row, memory.pool.allocate(num_missing, purpose))
    return wanted, num_missing


def give_back(memory: KvMemory, rows: NDArray[np.integer]) -> None:
    """Release blocks of ``rows`` behind the last that holds a computed token.

    Call it when the step that wrote them has finished, and ``num_computed`` tells what was kept.
    """
    tables, num_computed = memory.tables, memory.sequences.num_computed
    for row in rows.tolist():
        num_kept = ceil_div(int(num_computed[row]), tables.block_size) * tables.num_groups
        if tables.num_blocks[row] > num_kept:
            sequence = memory.sequences.at_row(row)
            memory.note_peak(sequence)
            purpose = memory.purpose_of(sequence, KvCause.DRAFT)
            memory.release(tables.cut_tail(row, num_kept), purpose)
