"""What a step's result says of sequences, beside tokens."""

import numpy as np

from pageframe.core.step import FinishReason, StepResult
from pageframe.executor.batch import StepBatch
from pageframe.executor.memory.sequence_table import SequenceTable

NO_TOKEN = -1
"""Stands for the token of a sequence that ended with ``FinishReason.ERROR`` and got none."""


def report_computed(
    sequences: SequenceTable, batch: StepBatch, named_rows: set[int], result: StepResult
) -> None:
    """Say what the step computed of those that the plan named; ``sequences`` is as before it."""
    is_named = np.isin(batch.rows, list(named_rows))
    named = batch.rows[is_named]
    result.computed_ids = sequences.sequence_ids[named].tolist()
    result.first_positions = sequences.num_computed[named].tolist()
    result.num_computed = batch.context_lens[is_named].tolist()


def report_error(result: StepResult, sequence_id: int, reason: str = "") -> None:
    """Say that a sequence ended with an error; a token that it got in this step still counts."""
    if reason:
        result.errors[sequence_id] = reason
    if sequence_id in result.sampled_ids:
        result.finish_reasons[result.sampled_ids.index(sequence_id)] = FinishReason.ERROR
        return
    result.sampled_ids.append(sequence_id)
    result.token_ids.append(NO_TOKEN)
    result.finish_reasons.append(FinishReason.ERROR)
