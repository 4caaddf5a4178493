"""Reading KV memory off as it is in a step: blocks, tokens in them, and copies."""

from collections.abc import Callable

import numpy as np

from bench.paper.cost_model import CostModel
from bench.paper.lengths import MAX_MODEL_LEN
from bench.paper.run_log import Usage
from pageframe.core.clock import ManualClock
from pageframe.executor.batch import StepBatch, StepOutput
from pageframe.executor.block_moves import BlockMoves
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.sim import SimConfig, SimRunner

VOCAB_SIZE = 32_000


class MeteredRunner(SimRunner):
    """The simulated runner; it says when a step is about to run, and counts copies.

    Args:
        cost: What steps cost.
        num_rows: Most sequences that run at once.
        clock: Advanced by the cost of each step.
        on_execute: Called with each batch before it runs, when memory is ready for it.
    """

    def __init__(
        self,
        cost: CostModel,
        *,
        num_rows: int,
        clock: ManualClock,
        on_execute: Callable[[StepBatch], None],
    ) -> None:
        super().__init__(
            SimConfig(
                vocab_size=VOCAB_SIZE,
                max_model_len=MAX_MODEL_LEN,
                max_num_rows=num_rows,
                kv_bytes_per_token=cost.kv_bytes_per_token,
                cost=cost.sim_cost(),
            ),
            clock,
        )
        self._on_execute = on_execute
        self._num_copies = 0

    def move_blocks(self, moves: BlockMoves) -> None:
        """Move, and count the copies on the device."""
        self._num_copies += len(moves.copy_targets)
        super().move_blocks(moves)

    def execute(self, batch: StepBatch) -> StepOutput:
        """Tell, then run the step."""
        self._on_execute(batch)
        return super().execute(batch)

    def take_num_copies(self) -> int:
        """Blocks copied since this was last asked."""
        num_copies, self._num_copies = self._num_copies, 0
        return num_copies


def read_usage(engine: StepEngine, batch: StepBatch) -> Usage:
    """How memory is used in the step of ``batch``, which is about to run.

    A token counts as written in the step that writes it. Sequences forked by this step's plan
    stand in rows already, but live only from the next step on; they do not count.
    ``num_token_slots`` counts a token once for each sequence that has it, so with sharing it may
    pass ``num_held_slots``.
    """
    sequences, block_size = engine.memory.sequences, engine.memory.options.block_size
    num_computed = np.zeros(sequences.num_rows, dtype=np.int64)
    rows = sequences.running_rows()
    num_computed[rows] = sequences.num_computed[rows]
    # A child has a row, and none in the batch yet.
    num_computed[batch.sample_rows] = 0
    num_computed[batch.rows] = batch.context_lens
    num_blocks, num_tokens = engine.account().held, int(num_computed.sum())
    return Usage(
        start_ns=0,
        num_running=int(np.count_nonzero(num_computed)),
        num_token_slots=num_tokens,
        num_unused_slots=num_blocks * block_size - num_tokens,
        num_held_slots=num_blocks * block_size,
        num_blocks=num_blocks,
        num_blocks_unshared=int((-(-num_computed // block_size)).sum()),
    )
