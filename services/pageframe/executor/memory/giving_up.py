"""Ways to give blocks up while a sequence lives on: three recoveries, and sliding windows.

    recompute   all blocks go; what is indexed may be found again as a prefix hit
    swap        the same, but the host tier holds a copy of each block for the sequence
    tail        only the last blocks go; the sequence keeps its row and catches up again

Whatever went, the sequence just has fewer computed tokens than before (law 1). To come back it is
matched like any newcomer: on the device first, then in the host tier.
"""

import numpy as np
from numpy.typing import NDArray

from pageframe.core.plan import Recovery
from pageframe.core.trace import KvCause, KvOperation
from pageframe.core.units import ceil_div
from pageframe.executor.memory.block_keys import BlockKey, private_key
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.sequence_table import Sequence, SwappedTail

_FOR_EVER = 1 << 40


def preempt(
    memory: KvMemory, sequence: Sequence, recovery: Recovery, num_tail_blocks: int = 0
) -> tuple[Recovery, int, int]:
    """Take blocks from a running sequence, which keeps its tokens; its generation goes up.

    Args:
        memory: Changed.
        sequence: Running.
        recovery: How it shall come back. Without room in the host tier a swap becomes a recompute;
            a tail that is no shorter than the whole becomes one too.
        num_tail_blocks: Blocks to give up under ``TAIL``, at least; see ``whole_depths``.

    Returns:
        How it gave way, how many blocks it gave up, and how many tokens it keeps computed.
    """
    num_blocks = memory.tables.num_held(sequence.row)
    if recovery is Recovery.TAIL and not _can_cut(memory, sequence, num_tail_blocks):
        recovery = Recovery.RECOMPUTE
    if recovery is Recovery.SWAP and not _swap_out(memory, sequence):
        recovery = Recovery.RECOMPUTE
    num_computed = 0
    if recovery is Recovery.TAIL:
        num_blocks = whole_depths(memory, num_tail_blocks)
        num_computed = cut_tail(memory, sequence, num_blocks)
        memory.sequences.generations[sequence.row] += 1
    else:
        memory.vacate(sequence, KvCause.PREEMPTED)
    sequence.generation += 1
    sequence.num_preemptions += 1
    return recovery, num_blocks, num_computed


def _can_cut(memory: KvMemory, sequence: Sequence, num_tail_blocks: int) -> bool:
    """Whether the tail is a real part, and what is computed again will see all that it should."""
    tables, options, row = memory.tables, memory.options, sequence.row
    end = int(tables.num_blocks[row])
    num_kept = (end - whole_depths(memory, num_tail_blocks)) // options.num_groups
    firsts = tables.first_blocks[row].tolist()
    if not max(firsts) < num_kept < end // options.num_groups:
        return False
    return all(
        first <= first_read
        for first, first_read in zip(
            firsts, options.first_blocks(num_kept * options.block_size), strict=True
        )
    )


def whole_depths(memory: KvMemory, num_blocks: int) -> int:
    """Blocks that a tail of at least ``num_blocks`` has: whole logical blocks go, in all groups."""
    num_groups = memory.options.num_groups
    return ceil_div(num_blocks, num_groups) * num_groups


def cut_tail(memory: KvMemory, sequence: Sequence, num_blocks: int) -> int:
    """Take the last ``num_blocks`` blocks from a running sequence, which catches up again.

    It has to be a multiple of the number of groups.

    Returns:
        How many tokens it keeps computed.
    """
    row, block_size = sequence.row, memory.options.block_size
    purpose = memory.purpose_of(sequence, KvCause.TAIL)
    memory.note_peak(sequence)
    num_kept = int(memory.tables.num_blocks[row]) - num_blocks
    memory.release(memory.tables.cut_tail(row, num_kept), purpose)
    sequences, num_kept = memory.sequences, num_kept // memory.options.num_groups
    sequences.num_computed[row] = min(int(sequences.num_computed[row]), num_kept * block_size)
    sequences.num_published[row] = min(int(sequences.num_published[row]), num_kept)
    return int(sequences.num_computed[row])


def leave_window(memory: KvMemory, rows: NDArray[np.integer]) -> None:
    """Give up blocks that no later token of ``rows`` will see."""
    sequences, tables = memory.sequences, memory.tables
    if not any(memory.options.windows):
        return
    # A window that reaches back for ever never begins behind position 0.
    windows = np.array([window or _FOR_EVER for window in memory.options.windows], dtype=np.int64)
    first_seen = np.maximum(sequences.num_computed[rows][:, np.newaxis] - windows + 1, 0)
    first_blocks = first_seen // memory.options.block_size
    has_left = (first_blocks > tables.first_blocks[rows]).any(axis=1)
    for row, firsts in zip(rows[has_left].tolist(), first_blocks[has_left], strict=True):
        sequence = sequences.at_row(row)
        memory.note_peak(sequence)
        block_ids = tables.cut_head(row, firsts.astype(np.int32))
        memory.release(block_ids, memory.purpose_of(sequence, KvCause.WINDOW))


def fail_transfers(memory: KvMemory) -> None:
    """The moves of this step were not made; forget what was to arrive or to be stored."""
    lost = set(memory.transfers.fail())
    for sequence in memory.sequences.all():
        for key in lost.intersection(sequence.host_keys):
            sequence.host_keys.remove(key)
            memory.host.drop_hold(key)
    for retention in memory.retentions:
        for key in lost.intersection(retention.held_keys):
            retention.held_keys.discard(key)
            memory.host.drop_hold(key)
    for key in lost:
        memory.host.remove(key)


def _swap_out(memory: KvMemory, sequence: Sequence) -> bool:
    """Have the host tier hold a copy of every computed block; False if it lacks the room."""
    row, host = sequence.row, memory.host
    if not host.num_slots:
        return False
    num_computed = int(memory.sequences.num_computed[row])
    keys, tail = _keys_of_blocks(memory, sequence, num_computed)
    num_new = sum(key not in host for key in keys)
    if num_new > host.num_slots - host.num_held:
        return False
    block_ids = memory.tables.blocks_of(row)[: len(keys)].tolist()
    purpose = memory.purpose_of(sequence, KvCause.SWAP)
    # What finds no room after all is computed again; what does is not lost.
    sequence.host_keys += memory.transfers.hold(KvOperation.SWAP_OUT, block_ids, keys, purpose)
    sequence.swapped_tail = tail
    return True


def _keys_of_blocks(
    memory: KvMemory, sequence: Sequence, num_computed: int
) -> tuple[list[BlockKey], SwappedTail | None]:
    """Keys of all blocks with computed tokens; the last ones' are private unless they are full.

    In the order of the block table, without what has left a window.
    """
    block_size, num_groups = memory.options.block_size, memory.options.num_groups
    token_ids = memory.sequences.tokens_of(sequence.row)
    chains = [chain.up_to(num_computed, token_ids, block_size) for chain in sequence.chains]
    num_full, num_inside = divmod(num_computed, block_size)
    columns = memory.tables.columns_of(sequence.row).tolist()
    keys = [
        chains[column % num_groups][column // num_groups]
        for column in columns
        if column < num_full * num_groups
    ]
    if not num_inside:
        return keys, None
    first = num_full * num_groups
    generation = sequence.generation + 1
    private = tuple(
        private_key(memory.epoch, sequence.sequence_id, generation, column)
        for column in range(first, first + num_groups)
    )
    return [*keys, *private], SwappedTail(private, num_full, num_inside)
