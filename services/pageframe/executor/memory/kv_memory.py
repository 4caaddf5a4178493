"""KV memory of one replica: pool, block tables and sequences, moved together.

Each method is one step in the life of a sequence and leaves all three consistent. What to do, and
in which order, is decided by ``apply``.
"""

import numpy as np

from pageframe.core.step import Announcement, SequenceAccount
from pageframe.core.trace import KvCause, TraceSink
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.block_pool import BlockPool, BlockState
from pageframe.executor.memory.block_table import BlockTables
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.sequence_table import NO_ROW, Sequence, SequenceTable


class KvMemory:
    """Who runs where, over which blocks.

    Attributes:
        pool: Owner of block state.
        tables: Block tables by row.
        sequences: Known sequences, and columns by row.
        last_received_step: Number of the last plan that came in order; 0 before the first.
        last_applied_step: Number of the last plan that was not refused; 0 before the first.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_sequences: int,
        max_model_len: int,
        trace: TraceSink,
    ) -> None:
        self.pool = BlockPool(num_blocks, trace)
        self.tables = BlockTables(max_num_sequences, max_model_len, block_size)
        self.sequences = SequenceTable(max_num_sequences, max_model_len)
        self.last_received_step = 0
        self.last_applied_step = 0
        self._trace = trace

    def announce(self, announcement: Announcement) -> Sequence:
        """Know a sequence that was not known; it holds no blocks yet."""
        sequence = Sequence(
            sequence_id=announcement.sequence_id,
            generation=announcement.generation,
            num_prompt_tokens=announcement.num_prompt_tokens,
            sampling=announcement.sampling,
            sample_index=announcement.sample_index,
            parked_tokens=np.array(announcement.token_ids, dtype=np.int32),
        )
        self.sequences.add(sequence)
        self._trace.sequence_begin(
            announcement.sequence_id,
            trace_id=announcement.trace_id,
            span_id=announcement.span_id,
            request_id=announcement.request_id,
            tenant=announcement.tenant,
        )
        return sequence

    def cover(self, row: int, num_tokens: int) -> None:
        """Allocate what the row lacks to hold its first ``num_tokens`` tokens, for a prefill.

        Raises:
            BlocksExhaustedError: too few are free; nothing was changed.
        """
        num_missing = self.tables.num_missing(row, num_tokens)
        if num_missing:
            purpose = self._purpose(self.sequences.at_row(row), KvCause.PREFILL)
            self.tables.append(row, self.pool.allocate(num_missing, purpose))

    def cover_next(self, rows: Int32Array) -> None:
        """Allocate a block for each of ``rows`` whose next token needs one, for a decode.

        Raises:
            BlocksExhaustedError: too few are free; nothing was changed.
        """
        sequences = self.sequences
        crossing = self.tables.rows_at_boundary(rows, sequences.num_computed)
        if len(crossing):
            block_ids = self.pool.allocate_each(
                sequences.sequence_ids[crossing],
                sequences.generations[crossing],
                sequences.num_computed[crossing],
                KvCause.DECODE,
            )
            self.tables.append_each(crossing, block_ids)

    def preempt(self, sequence: Sequence) -> int:
        """Take blocks and row from a running sequence, which keeps its tokens.

        Returns:
            How many blocks it gave up.
        """
        num_blocks = self._vacate(sequence, KvCause.PREEMPTED)
        sequence.generation += 1
        sequence.num_preemptions += 1
        return num_blocks

    def forget(self, sequence: Sequence, cause: KvCause) -> SequenceAccount:
        """End a sequence in any state: its blocks are released, and it is known no more."""
        if sequence.row != NO_ROW:
            self._vacate(sequence, cause)
        self.sequences.remove(sequence)
        self._trace.sequence_end(sequence.sequence_id)
        return SequenceAccount(
            num_blocks_peak=sequence.num_blocks_peak, num_preemptions=sequence.num_preemptions
        )

    def reset(self) -> None:
        """Forget everything, for a new scheduler epoch. No step may be in flight."""
        self.pool.current_step = 0
        for sequence in self.sequences.all():
            self.forget(sequence, KvCause.TAKEOVER)
        self.pool.restart()
        self.last_received_step = self.last_applied_step = 0

    def _vacate(self, sequence: Sequence, cause: KvCause) -> int:
        purpose = self._purpose(sequence, cause)
        block_ids = self.tables.clear(sequence.row)
        self.sequences.unseat(sequence)
        sequence.num_blocks_peak = max(sequence.num_blocks_peak, len(block_ids))
        # A block in quarantine has lost its references already.
        sound = block_ids[self.pool.states[block_ids] != BlockState.QUARANTINED]
        self.pool.release(sound, purpose)
        return len(block_ids)

    def _purpose(self, sequence: Sequence, cause: KvCause) -> Purpose:
        return Purpose(
            cause,
            sequence.sequence_id,
            sequence.generation,
            int(self.sequences.num_computed[sequence.row]),
        )
