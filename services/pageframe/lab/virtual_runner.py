"""A runner for virtual time: no tokens worth the name, and time by a formula.

``SimRunner`` proves that every token depends on its whole history. Here nobody looks at tokens, so
each is made from where it stands, and a step costs next to nothing on the machine that simulates.
"""

from collections.abc import Callable

import numpy as np

from pageframe.core.clock import ManualClock
from pageframe.executor.batch import Int32Array, ModelFacts, StepBatch, StepOutput
from pageframe.executor.block_moves import BlockMoves
from pageframe.lab.simulate_cost import DeviceCost
from pageframe.lab.tensorless import TensorlessRunner

VOCAB_SIZE = 1 << 30
"""Large, so that a prompt's first token can tell it from all others."""

_FIRST_SAMPLED_TOKEN_ID = 1 << 29
# Odd, so that no sequence says the same again: there is nothing to guess drafts from.
_STRIDE = 65_537


class VirtualRunner(TensorlessRunner):
    """Runs steps of no model in virtual time.

    Args:
        cost: What steps cost.
        clock: Advanced by that.
        max_model_len: Most tokens of one sequence.
        on_execute: Called with each batch before it runs.
    """

    def __init__(
        self,
        cost: DeviceCost,
        clock: ManualClock,
        *,
        max_model_len: int,
        on_execute: Callable[[StepBatch], None],
    ) -> None:
        self.facts = ModelFacts(
            name=cost.name,
            folder="",
            vocab_size=VOCAB_SIZE,
            max_model_len=max_model_len,
            eos_token_ids=(0,),
            kv_bytes_per_token=cost.kv_bytes_per_token,
            device="virtual",
            dtype="bfloat16",
            kv_dtype="bfloat16",
            runner="sim",
        )
        self._cost = cost
        self._clock = clock
        self._on_execute = on_execute

    def move_blocks(self, moves: BlockMoves) -> None:
        """Let the time for it pass."""
        self._clock.advance_ns(self._cost.of_moves(moves))

    def execute(self, batch: StepBatch) -> StepOutput:
        """Let the time of the step pass."""
        batch.on_launch()
        self._on_execute(batch)
        cost_ns = self._cost.of(batch)
        self._clock.advance_ns(cost_ns)
        positions = batch.sample_positions.astype(np.int64)
        mixed = (positions * _STRIDE + batch.sample_rows) % _FIRST_SAMPLED_TOKEN_ID
        token_ids: Int32Array = (mixed + _FIRST_SAMPLED_TOKEN_ID).astype(np.int32)
        return StepOutput(token_ids=token_ids, execute_ns=cost_ns)
