"""Entering full blocks into the prefix index, once the step that wrote them is over (law 5).

In a decode step of 256 sequences 16 blocks become full, each of another sequence. Which these are
is found by array operations over all rows; what remains is a hash, a dictionary entry and a record
for each block, in one loop of plain Python: for the few rows that have news, arrays of their tokens
and blocks would cost more to set up than they save.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageframe.core.trace import KvCause
from pageframe.executor.memory.block_keys import TOKEN_BYTES, BlockKey, little_endian
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.retaining import pin_wanted


class _News(NamedTuple):
    """A row whose blocks ``[start, end)`` have become full."""

    row: int
    sequence_id: int
    generation: int
    num_computed: int
    start: int
    end: int


def publish(memory: KvMemory, rows: NDArray[np.integer]) -> None:
    """Enter blocks of ``rows`` that have become full into the prefix index.

    Call it when the step that wrote them has finished.
    """
    if not memory.options.has_prefix_cache:
        return
    sequences = memory.sequences
    at = rows.astype(np.int64, copy=False)
    num_full = sequences.num_computed[at] // memory.options.block_size
    has_news = num_full > sequences.num_published[at]
    if not np.count_nonzero(has_news):
        return
    at, num_full = at[has_news], num_full[has_news]
    columns = (
        at,
        sequences.sequence_ids[at],
        sequences.generations[at],
        sequences.num_computed[at],
        sequences.num_published[at],
        num_full,
    )
    sequences.num_published[at] = num_full
    news = [_News(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    for group in range(memory.options.num_groups):
        _publish_group(memory, news, group)


def _publish_group(memory: KvMemory, news: list[_News], group: int) -> None:
    """Enter the new blocks of one group of layers."""
    sequences, tables, block_size = memory.sequences, memory.tables, memory.options.block_size
    num_groups, block_bytes = tables.num_groups, TOKEN_BYTES * block_size
    data, row_bytes = little_endian(sequences.tokens), TOKEN_BYTES * sequences.tokens.shape[1]
    first_block, entry = tables.first_blocks.item, tables.entries.item
    block_ids: list[int] = []
    depths: list[int] = []
    keys: list[BlockKey] = []
    parents: list[BlockKey] = []
    contents: list[bytes] = []
    ends: list[int] = []
    for row, sequence_id, _, _, start, end in news:
        sequence = sequences.by_id(sequence_id)
        chain = sequence.chains[group] if group else sequence.keys
        start = max(start, first_block(row, group))
        if len(chain) < start < end:
            # A child of a fork has not asked for the keys of what its parent published.
            chain.up_to(start * block_size, sequences.tokens_of(row), block_size)
        for depth in range(start, end):
            place = row * row_bytes + depth * block_bytes
            tokens = bytes(data[place : place + block_bytes])
            block_ids.append(entry(row, depth * num_groups + group))
            depths.append(depth)
            parents.append(chain.parent_of(depth))
            keys.append(chain.key_of(depth, tokens))
            contents.append(tokens)
        ends.append(len(block_ids))
    was_entered = memory.pool.publish(
        np.array(block_ids, dtype=np.int64),
        keys,
        parents,
        contents,
        np.array(depths),
        group if num_groups > 1 else None,
    )
    memory.leaders.computed(keys)
    start = 0
    entered: list[tuple[int, int, int, list[int]]] = []
    for of_row, end in zip(news, ends, strict=True):
        named = [block_ids[place] for place in range(start, end) if was_entered[place]]
        start = end
        if named:
            entered.append((of_row.sequence_id, of_row.generation, of_row.num_computed, named))
    memory.pool.recorder.record_indexed_each(KvCause.SEALED, entered)
    pin_wanted(memory, keys)
