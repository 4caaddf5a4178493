"""Entering full blocks into the prefix index, once the step that wrote them is over (law 5).

A block that is full waits for that, and may wait longer: nobody misses it until somebody looks for
a prefix or gives blocks up. So the books are brought up to date by whoever does one of these, and
at the latest while the next step computes: a step in which everybody merely decodes spends no time
on them where the device computes beside Python.

    step k   apply ─▶ launch ──────────▶ wait ─▶ tokens: blocks are full
    step k+1 apply ─▶ launch ─▶ publish ─▶ wait ─▶ tokens

In a decode step of 256 sequences 16 blocks become full, each of another sequence. Which these are
is found by array operations over all rows; what remains is a hash, a dictionary entry and a record
for each block, in one loop of plain Python: for the few rows that have news, arrays of their tokens
and blocks would cost more to set up than they save.
"""

import numpy as np
from numpy.typing import NDArray

from pageframe.core.plan import StepPlan
from pageframe.core.trace import KvCause
from pageframe.executor.memory.block_keys import TOKEN_BYTES, BlockKey, little_endian
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.retaining import pin_wanted

_Row = tuple[int, int, int, int]
"""Row, its computed tokens, and the blocks ``[start, end)`` of it that have become full."""
_Block = tuple[int, int, BlockKey, BlockKey, bytes]
"""Block id, depth in its chain, key, the key before that, and its tokens."""


class Publisher:
    """Enters full blocks into the prefix index before anybody misses them, and no sooner."""

    def __init__(self, memory: KvMemory) -> None:
        self._memory = memory
        self._is_behind = False
        self._has_windows = any(memory.options.windows)

    def note_step(self) -> None:
        """A step has finished, and may have filled blocks."""
        self._is_behind = True
        if self._has_windows:
            self.catch_up()  # What a window leaves behind is given up right away.

    def before(self, plan: StepPlan) -> None:
        """Catch up, unless all that this plan does is to let running sequences go on."""
        if plan.announce or plan.finish or len(plan.victims) or len(plan.may) or plan.branches:
            self.catch_up()

    def catch_up(self) -> None:
        """Publish what finished steps have filled.

        Call it before anything that looks for a prefix, or takes blocks from a sequence.
        """
        if self._is_behind:
            self._is_behind = False
            publish(self._memory, self._memory.sequences.running_rows())


def publish(memory: KvMemory, rows: NDArray[np.integer]) -> None:
    """Enter blocks of ``rows`` that have become full into the prefix index.

    Call it when the step that wrote them has finished.
    """
    if not memory.options.has_prefix_cache:
        return
    sequences = memory.sequences
    at = rows.astype(np.int64, copy=False)
    num_full = sequences.num_computed[at] // memory.options.block_size
    places = (num_full > sequences.num_published[at]).nonzero()[0]
    if not len(places):
        return
    at, num_full = at[places], num_full[places]
    columns = (at, sequences.num_computed[at], sequences.num_published[at], num_full)
    news: list[_Row] = list(zip(*(column.tolist() for column in columns), strict=True))
    sequences.num_published[at] = num_full
    for group in range(memory.options.num_groups):
        _publish_group(memory, news, group)


def _publish_group(memory: KvMemory, news: list[_Row], group: int) -> None:
    """Enter the new blocks of one group of layers."""
    blocks, ends = _read_blocks(memory, news, group)
    if not blocks:
        return
    block_ids, depths, keys, parents, token_ids = zip(*blocks, strict=True)
    entered = memory.pool.publish(
        np.array(block_ids, dtype=np.int64),
        keys,
        parents,
        token_ids,
        np.array(depths),
        group if memory.options.num_groups > 1 else None,
    )
    memory.leaders.computed(keys)
    _record(memory, news, ends, block_ids, entered)
    pin_wanted(memory, keys)


def _read_blocks(memory: KvMemory, news: list[_Row], group: int) -> tuple[list[_Block], list[int]]:
    """The new blocks, row by row, and where those of each row end."""
    sequences, tables, block_size = memory.sequences, memory.tables, memory.options.block_size
    num_groups, block_bytes = tables.num_groups, TOKEN_BYTES * block_size
    data, row_bytes = little_endian(sequences.tokens), TOKEN_BYTES * sequences.tokens.shape[1]
    has_window, first_block = memory.options.windows[group] > 0, tables.first_blocks.item
    at_row, entry = sequences.at_row, tables.entries.item
    blocks: list[_Block] = []
    ends: list[int] = []
    for row, _, start, end in news:
        sequence = at_row(row)
        chain = sequence.chains[group] if group else sequence.keys
        if has_window:
            start = max(start, first_block(row, group))
        if len(chain) < start < end:
            # A child of a fork has not asked for the keys of what its parent published.
            chain.up_to(start * block_size, sequences.tokens_of(row), block_size)
        for depth in range(start, end):
            place = row * row_bytes + depth * block_bytes
            tokens = data[place : place + block_bytes].tobytes()
            parent, key = chain.link(depth, tokens)
            block_id = entry(row, depth * num_groups + group)
            blocks.append((block_id, depth, key, parent, tokens))
        ends.append(len(blocks))
    return blocks, ends


def _record(
    memory: KvMemory,
    news: list[_Row],
    ends: list[int],
    block_ids: tuple[int, ...],
    entered: list[int],
) -> None:
    """Record what was entered, for each sequence together."""
    at_row, unnamed, start = memory.sequences.at_row, set(entered), 0
    records: list[tuple[int, int, int, list[int]]] = []
    for (row, num_computed, _, _), end in zip(news, ends, strict=True):
        # A parent and its child have the same block; it is the parent's, who comes first.
        named = [block_id for block_id in block_ids[start:end] if block_id in unnamed]
        unnamed.difference_update(named)
        start = end
        if named:
            sequence = at_row(row)
            records.append((sequence.sequence_id, sequence.generation, num_computed, named))
    memory.pool.recorder.record_indexed_each(KvCause.SEALED, records)
