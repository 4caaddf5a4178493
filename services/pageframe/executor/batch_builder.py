"""Turns an applied step into the flat batch that a runner computes.

A decode is a chunk of one token, so there is one path for both: every sequence of the batch has a
span ``[num_computed, num_computed + n)``, and the spans are laid end to end by array arithmetic.

    spans        a: [9, 10)   b: [4, 7)
    query_start  0  1        4
    positions    9   4 5 6              = index in the batch + (num_computed - query_start)
"""

import numpy as np
from numpy.typing import NDArray

from pageframe.executor.batch import DraftSamples, Int32Array, StepBatch
from pageframe.executor.block_moves import Int64Array
from pageframe.executor.memory.apply import AppliedStep
from pageframe.executor.memory.block_table import BlockTables
from pageframe.executor.memory.sequence_table import SequenceTable


class BatchBuilder:
    """Builds batches in buffers of its own, so a device may mirror them at fixed addresses."""

    def __init__(
        self, tables: BlockTables, sequences: SequenceTable, *, max_step_tokens: int
    ) -> None:
        self._tables = tables
        self._sequences = sequences
        num_rows, width = tables.entries.shape
        self._rows: Int64Array = np.zeros(num_rows, dtype=np.int64)
        self._num_new: Int32Array = np.zeros(num_rows, dtype=np.int32)
        self._query_start: Int32Array = np.zeros(num_rows + 1, dtype=np.int32)
        self._context_lens: Int32Array = np.zeros(num_rows, dtype=np.int32)
        self._block_tables: Int32Array = np.zeros((num_rows, width), dtype=np.int32)
        self._index: Int32Array = np.arange(max_step_tokens, dtype=np.int32)
        self._token_ids: Int32Array = np.zeros(max_step_tokens, dtype=np.int32)
        self._positions: Int32Array = np.zeros(max_step_tokens, dtype=np.int32)
        self._slots: Int64Array = np.zeros(max_step_tokens * tables.num_groups, dtype=np.int64)

    def build(self, applied: AppliedStep) -> StepBatch:
        """The batch of ``applied``: decodes in join order, then chunks in plan order.

        Its arrays are views into buffers of this object, valid until its next call.
        """
        num_decodes = len(applied.decode_rows)
        num_sequences = num_decodes + len(applied.chunks)
        rows = self._rows[:num_sequences]
        num_new = self._num_new[:num_sequences]
        rows[:num_decodes] = applied.decode_rows
        num_new[:num_decodes] = 1
        if applied.chunks:
            rows[num_decodes:] = list(applied.chunks)
            num_new[num_decodes:] = list(applied.chunks.values())
        query_start = self._query_start[: num_sequences + 1]
        np.cumsum(num_new, out=query_start[1:])
        context_lens = self._context_lens[:num_sequences]
        np.add(self._sequences.num_computed[rows], num_new, out=context_lens)
        self._lay_out(rows, num_new, query_start)
        num_columns = int(self._tables.num_blocks[rows].max(initial=0))
        block_tables = self._block_tables[:num_sequences]
        block_tables[:, :num_columns] = self._tables.entries[rows, :num_columns]
        num_tokens = int(query_start[-1])
        has_caught_up = context_lens >= self._sequences.num_tokens[rows]
        samples: Int32Array = np.flatnonzero(has_caught_up).astype(np.int32)
        drafts = None
        if applied.drafts:
            samples, drafts = self._with_drafts(rows, context_lens, samples)
        sample_rows: Int32Array = rows[samples].astype(np.int32)
        if applied.forks:
            samples, sample_rows = _with_forks(rows, samples, applied)
            drafts = drafts and drafts.pad(len(samples))
        return StepBatch(
            step=applied.result.step,
            num_decodes=num_decodes,
            rows=rows,
            token_ids=self._token_ids[:num_tokens],
            positions=self._positions[:num_tokens],
            slots=self._slots[: num_tokens * self._tables.num_groups],
            query_start=query_start,
            context_lens=context_lens,
            block_tables=block_tables,
            samples=samples,
            sample_rows=sample_rows,
            drafts=drafts,
        )

    def _with_drafts(
        self, rows: Int64Array, context_lens: Int32Array, samples: Int32Array
    ) -> tuple[Int32Array, DraftSamples]:
        """Sample once more for each token that is computed and not known."""
        num_drafts = context_lens[samples] - self._sequences.num_tokens[rows[samples]]
        num_samples = num_drafts + 1
        samples = np.repeat(samples, num_samples)
        ends: Int32Array = np.repeat(np.cumsum(num_samples, dtype=np.int32), num_samples)
        places: Int32Array = np.arange(1, len(samples) + 1, dtype=np.int32)
        num_behind: Int32Array = ends - places
        positions = context_lens[samples] - num_behind
        expected: Int32Array = np.full(len(samples), -1, dtype=np.int32)
        is_led = num_behind > 0
        expected[is_led] = self._sequences.tokens[rows[samples[is_led]], positions[is_led]]
        return samples, DraftSamples(num_behind, expected)

    def _lay_out(self, rows: Int64Array, num_new: Int32Array, query_start: Int32Array) -> None:
        """Fill tokens, positions and slots of all spans."""
        num_tokens = int(query_start[-1])
        block_size = self._tables.block_size
        shift = self._sequences.num_computed[rows] - query_start[:-1]
        positions = self._positions[:num_tokens]
        np.add(self._index[:num_tokens], np.repeat(shift, num_new), out=positions)
        token_rows = np.repeat(rows, num_new)
        self._token_ids[:num_tokens] = self._sequences.tokens[token_rows, positions]
        columns: NDArray[np.integer] = positions // block_size
        offsets = positions % block_size
        if self._tables.num_groups > 1:
            # One slot in each group of layers, token by token.
            columns = self._tables.columns_at(columns).ravel()
            token_rows = np.repeat(token_rows, self._tables.num_groups)
            offsets = np.repeat(offsets, self._tables.num_groups)
        # 64 bits: a pool may have more slots than int32 can count.
        blocks = self._tables.entries[token_rows, columns].astype(np.int64)
        np.add(blocks * block_size, offsets, out=self._slots[: len(columns)])


def _with_forks(
    rows: Int64Array, samples: Int32Array, applied: AppliedStep
) -> tuple[Int32Array, Int32Array]:
    """Let each child sample from its parent's logits, with its own row's sampling state."""
    index_of = {row: index for index, row in enumerate(rows.tolist())}
    parents: Int32Array = np.array(
        [index_of[parent.row] for parent, _ in applied.forks], dtype=np.int32
    )
    children: Int32Array = np.array([child.row for _, child in applied.forks], dtype=np.int32)
    sample_rows: Int32Array = rows[samples].astype(np.int32)
    return np.concatenate([samples, parents]), np.concatenate([sample_rows, children])
