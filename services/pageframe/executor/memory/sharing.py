"""Sharing blocks between sequences, and the end of sharing: copy-on-write.

A fork shares every block, the last partly filled one too. Law 6: a sequence writes in place only
into a block with one reference that is not indexed; else it copies the block first. A pin is a
reference, and the copies of a step are made before its writes, so nothing else has to be asked.
The last of several owners keeps the block, for by then it is alone.
"""

import numpy as np
from numpy.typing import NDArray

from pageframe.core.trace import KvCause
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.block_columns import BlockState
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.sequence_table import NO_ROW, Sequence


def rows_to_copy(memory: KvMemory, rows: Int32Array) -> Int32Array:
    """Those of ``rows`` that would next write into a block that is not theirs alone."""
    tables, columns = memory.tables, memory.pool.columns
    logical = memory.sequences.num_computed[rows] // memory.options.block_size
    is_inside = logical < tables.num_blocks[rows]
    rows, logical = rows[is_inside], logical[is_inside]
    blocks = tables.entries[rows, logical]
    is_shared = (columns.ref_counts[blocks] > 1) | memory.pool.index.is_indexed[blocks]
    return rows[is_shared]


def make_writable(memory: KvMemory, rows: Int32Array, cause: KvCause) -> None:
    """Copy the block into which each of ``rows`` writes next, where that is not its own.

    The last of several owners keeps the block, for by then it is alone.

    Raises:
        BlocksExhaustedError: too few are available.
    """
    rows = rows_to_copy(memory, rows)
    if not len(rows):
        return
    columns, tables, sequences = memory.pool.columns, memory.tables, memory.sequences
    logical = sequences.num_computed[rows] // memory.options.block_size
    sources = tables.entries[rows, logical]
    is_copied = ~_is_last_owner(sources, columns.ref_counts, memory.pool.index.is_indexed)
    rows, logical, sources = rows[is_copied], logical[is_copied], sources[is_copied]
    targets = memory.pool.copy_each(
        sources,
        sequences.sequence_ids[rows],
        sequences.generations[rows],
        sequences.num_computed[rows],
        sequences.tenant_ids[rows],
        cause,
    )
    memory.transfers.copy(sources.tolist(), targets.tolist())
    tables.entries[rows, logical] = targets
    for sequence_id in sequences.sequence_ids[rows].tolist():
        sequences.by_id(sequence_id).num_copies_on_write += 1


def _is_last_owner(
    blocks: Int32Array, ref_counts: Int32Array, is_indexed: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Who keeps its block: the last to write into one that has no other references: bool [n]."""
    num_seen: dict[int, int] = {}
    is_last: list[bool] = []
    for block_id, num_references in zip(blocks.tolist(), ref_counts[blocks].tolist(), strict=True):
        num = num_seen[block_id] = num_seen.get(block_id, 0) + 1
        is_last.append(num == num_references)
    return np.array(is_last, dtype=np.bool_) & ~is_indexed[blocks]


def can_fork(memory: KvMemory, parent: Sequence) -> bool:
    """Whether all blocks of a running parent are sound; it ends soon if one was lost."""
    states = memory.pool.columns.states[memory.tables.blocks_of(parent.row)]
    return bool((states == BlockState.HELD).all())


def fork(
    memory: KvMemory, parent: Sequence, child_id: int, sample_index: int, trace_span_id: bytes
) -> Sequence:
    """A child that shares all blocks of a running parent, and stands where it stands."""
    assert parent.row != NO_ROW, f"sequence {parent.sequence_id} does not run"
    child = Sequence(
        sequence_id=child_id,
        generation=0,
        num_prompt_tokens=parent.num_prompt_tokens,
        sampling=parent.sampling,
        sample_index=sample_index,
        parked_tokens=memory.sequences.tokens_of(parent.row).copy(),
        keys=parent.keys.fork(),
        request_id=parent.request_id,
        tenant_id=parent.tenant_id,
        session_id=parent.session_id,
        trace_context=(parent.trace_context[0], trace_span_id),
        num_cached_tokens=parent.num_cached_tokens,
    )
    memory.enter(child)
    sequences, tables = memory.sequences, memory.tables
    sequences.seat(child, int(sequences.num_computed[parent.row]))
    # What the parent offered to the index, the child must not offer again.
    sequences.num_published[child.row] = sequences.num_published[parent.row]
    block_ids = tables.blocks_of(parent.row).copy()
    memory.pool.acquire(block_ids, memory.purpose_of(child, KvCause.FORK))
    tables.fill(child.row, block_ids, int(tables.first_block[parent.row]))
    child.num_blocks_shared = len(block_ids)
    return child
