"""Entering full blocks into the prefix index, once the step that wrote them is over (law 5).

The simple thing is a call per block. In a decode step of 256 sequences 16 blocks become full, each
of another sequence, and sixteen small calls into NumPy each would cost more than all else that the
index needs. So tokens and blocks of all rows are gathered at once, and what remains per block is a
hash and a dictionary entry.
"""

import numpy as np
from numpy.typing import NDArray

from pageframe.core.trace import KvCause
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.block_keys import TOKEN_BYTES, BlockKey, token_bytes
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.retaining import pin_wanted


def publish(memory: KvMemory, rows: Int32Array) -> None:
    """Enter blocks of ``rows`` that have become full into the prefix index.

    Call it when the step that wrote them has finished.
    """
    if not memory.options.has_prefix_cache:
        return
    sequences, block_size = memory.sequences, memory.options.block_size
    num_full = sequences.num_computed[rows] // block_size
    has_news = num_full > sequences.num_published[rows]
    if not has_news.any():
        return
    rows, num_full = rows[has_news], num_full[has_news]
    first = np.maximum(sequences.num_published[rows], memory.tables.first_block[rows])
    sequences.num_published[rows] = num_full
    num_new = num_full - first
    depths = np.arange(num_new.sum()) - np.repeat(np.cumsum(num_new) - num_new - first, num_new)
    _publish_blocks(memory, rows, num_new, depths)


def _publish_blocks(
    memory: KvMemory, rows: Int32Array, num_new: Int32Array, depths: NDArray[np.int64]
) -> None:
    """Enter ``num_new[i]`` blocks of each row; ``depths`` names them, one row after the other."""
    sequences, block_size = memory.sequences, memory.options.block_size
    row_of = np.repeat(rows, num_new)
    block_ids = memory.tables.entries[row_of, depths]
    places = depths[:, np.newaxis] * block_size + np.arange(block_size)
    data = token_bytes(sequences.tokens[row_of[:, np.newaxis], places])
    stride = TOKEN_BYTES * block_size
    tokens = [data[start : start + stride] for start in range(0, len(data), stride)]
    named = depths.tolist()
    keys: list[BlockKey] = []
    parents: list[BlockKey] = []
    start = 0
    for row, sequence_id, count in zip(
        rows.tolist(), sequences.sequence_ids[rows].tolist(), num_new.tolist(), strict=True
    ):
        chain = sequences.by_id(sequence_id).keys
        if count and len(chain) < named[start]:
            # A child of a fork has not asked for the keys of what its parent published.
            chain.up_to(named[start] * block_size, sequences.tokens_of(row), block_size)
        for place in range(start, start + count):
            parents.append(chain.parent_of(named[place]))
            keys.append(chain.key_of(named[place], tokens[place]))
        start += count
    was_entered = memory.pool.publish(block_ids, keys, parents, tokens, depths)
    memory.leaders.computed(keys)
    _record(memory, rows, num_new, block_ids, was_entered)
    pin_wanted(memory, keys)


def _record(
    memory: KvMemory,
    rows: Int32Array,
    num_new: Int32Array,
    block_ids: Int32Array,
    was_entered: list[bool],
) -> None:
    """One record for each row that entered anything."""
    sequences = memory.sequences
    columns = (
        sequences.sequence_ids[rows].tolist(),
        sequences.generations[rows].tolist(),
        sequences.num_computed[rows].tolist(),
        num_new.tolist(),
    )
    blocks = block_ids.tolist()
    start = 0
    for sequence_id, generation, num_computed, count in zip(*columns, strict=True):
        end = start + count
        entered = [blocks[place] for place in range(start, end) if was_entered[place]]
        start = end
        if entered:
            purpose = Purpose(KvCause.SEALED, sequence_id, generation, num_computed)
            memory.pool.record_published(entered, purpose)
