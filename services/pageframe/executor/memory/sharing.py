"""Sharing blocks between sequences, and the end of sharing: copy-on-write.

A fork shares every block, the last partly filled one too. Law 6: a sequence writes in place only
into a block with one reference that is not indexed; else it copies the block first. A pin is a
reference, and the copies of a step are made before its writes, so nothing else has to be asked.
The last of several owners keeps the block, for by then it is alone.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageframe.core.trace import KvCause
from pageframe.executor.batch import Int32Array
from pageframe.executor.block_moves import Int64Array
from pageframe.executor.memory.block_columns import BlockState
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.sequence_table import NO_ROW, Sequence


def entries_to_copy(memory: KvMemory, rows: NDArray[np.integer]) -> tuple[Int64Array, Int64Array]:
    """Where ``rows`` would next write into a block that is not theirs alone.

    Returns:
        Rows and columns of the block tables, int64 [n] each, in the order of ``rows``.
    """
    at, columns, blocks = _entries_written(memory, rows)
    is_shared = memory.pool.columns.ref_counts[blocks] > 1
    is_shared |= memory.pool.index.is_indexed[blocks]
    return at[is_shared], columns[is_shared]


def make_writable(memory: KvMemory, rows: NDArray[np.integer], cause: KvCause) -> None:
    """Copy the blocks into which each of ``rows`` writes next, where they are not its own.

    The last of several owners keeps the block, for by then it is alone.

    Raises:
        BlocksExhaustedError: too few are available.
    """
    at, columns, sources = _copies_of(memory, rows)
    if not sources:
        return
    sequences = memory.sequences
    sequence_ids = sequences.sequence_ids[at]
    targets = memory.pool.copy_each(
        sources,
        sequence_ids,
        sequences.generations[at],
        sequences.num_computed[at],
        sequences.tenant_ids[at],
        cause,
    )
    memory.transfers.copy(sources, targets.tolist())
    memory.tables.entries[at, columns] = targets
    for sequence_id in sequence_ids.tolist():
        sequences.by_id(sequence_id).num_copies_on_write += 1


def _copies_of(
    memory: KvMemory, rows: NDArray[np.integer]
) -> tuple[Int64Array, Int64Array, list[int]]:
    """Row, column of its table and block, of every block to copy; in the order of ``rows``."""
    at, columns, blocks = _entries_written(memory, rows)
    is_indexed = memory.pool.index.is_indexed[blocks].tolist()
    num_references = memory.pool.columns.ref_counts[blocks].tolist()
    num_writers: dict[int, int] = {}
    is_copied: list[int] = []
    sources: list[int] = []
    for index, block_id in enumerate(blocks.tolist()):
        num = num_writers[block_id] = num_writers.get(block_id, 0) + 1
        if num < num_references[index] or is_indexed[index]:
            is_copied.append(index)
            sources.append(block_id)
    if len(sources) < len(at):
        at, columns = at[is_copied], columns[is_copied]
    return at, columns, sources


def _entries_written(
    memory: KvMemory, rows: NDArray[np.integer]
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """The entries into whose blocks ``rows`` write next, as far as there are such already.

    Returns:
        Rows and columns of the block tables, and what stands there: int64 [n] each.
    """
    tables = memory.tables
    at: Int64Array = rows.astype(np.int64, copy=False)
    columns = memory.sequences.num_computed[at].astype(np.int64) // memory.options.block_size
    if tables.num_groups > 1:
        at = np.repeat(at, tables.num_groups)
        columns = tables.columns_at(columns).ravel()
    is_inside = columns < tables.num_blocks[at]
    if np.count_nonzero(is_inside) < len(at):
        at, columns = at[is_inside], columns[is_inside]
    return at, columns, tables.entries[at, columns].astype(np.int64)


def can_fork(memory: KvMemory, parent: Sequence) -> bool:
    """Whether all blocks of a running parent are sound; it ends soon if one was lost."""
    states = memory.pool.columns.states[memory.tables.blocks_of(parent.row)]
    return bool((states == BlockState.HELD).all())


def fork(
    memory: KvMemory, parent: Sequence, child_id: int, sample_index: int, trace_span_id: bytes
) -> Sequence:
    """A child that shares all blocks of a running parent, and stands where it stands."""
    return seat_heir(memory, inherit(memory, parent, child_id, sample_index, trace_span_id))


class Heir(NamedTuple):
    """A child that refers to its parent's blocks and has no row yet; the parent may end.

    Attributes:
        child: Known, not running.
        block_ids: int32 [n], as ``BlockTables.blocks_of`` gave them.
        first_blocks: int32 [G].
        num_computed: Tokens that those blocks hold.
        num_published: Full blocks that the parent offered to the prefix index.
    """

    child: Sequence
    block_ids: Int32Array
    first_blocks: Int32Array
    num_computed: int
    num_published: int


def inherit(
    memory: KvMemory,
    parent: Sequence,
    child_id: int,
    sample_index: int,
    trace_span_id: bytes,
    generation: int = 0,
) -> Heir:
    """Let a child of a running parent refer to all its blocks."""
    assert parent.row != NO_ROW, f"sequence {parent.sequence_id} does not run"
    child = Sequence(
        sequence_id=child_id,
        generation=generation,
        num_prompt_tokens=parent.num_prompt_tokens,
        sampling=parent.sampling,
        sample_index=sample_index,
        parked_tokens=memory.sequences.tokens_of(parent.row).copy(),
        keys=parent.keys.fork(),
        more_keys=tuple(chain.fork() for chain in parent.more_keys),
        request_id=parent.request_id,
        tenant_id=parent.tenant_id,
        is_steered=parent.is_steered,
        session_id=parent.session_id,
        trace_context=(parent.trace_context[0], trace_span_id),
        num_cached_tokens=parent.num_cached_tokens,
    )
    memory.enter(child)
    sequences, tables, row = memory.sequences, memory.tables, parent.row
    block_ids = tables.blocks_of(row).copy()
    num_computed = int(sequences.num_computed[row])
    purpose = Purpose(KvCause.FORK, child_id, generation, num_computed, child.tenant_id)
    memory.pool.acquire(block_ids, purpose)
    child.num_blocks_shared = len(block_ids)
    # What the parent offered to the index, the child must not offer again.
    num_published = int(sequences.num_published[row])
    return Heir(child, block_ids, tables.first_blocks[row].copy(), num_computed, num_published)


def seat_heir(memory: KvMemory, heir: Heir) -> Sequence:
    """Let a child run that refers to its blocks already."""
    child, sequences = heir.child, memory.sequences
    sequences.seat(child, heir.num_computed)
    sequences.num_published[child.row] = heir.num_published
    memory.tables.fill(child.row, heir.block_ids, heir.first_blocks)
    return child
