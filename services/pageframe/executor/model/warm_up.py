"""What a runner warms up with: a batch that nobody has asked for."""

import numpy as np

from pageframe.executor.batch import StepBatch


def prompt_in_block_0(num_tokens: int, num_groups: int) -> StepBatch:
    """A batch of one sequence whose ``num_tokens`` tokens fit into block 0, of every group."""
    tokens = np.arange(num_tokens, dtype=np.int32)
    zero = np.zeros(1, np.int32)
    return StepBatch(
        step=0,
        num_decodes=int(num_tokens == 1),
        rows=zero,
        token_ids=np.zeros(num_tokens, np.int32),
        positions=tokens,
        slots=np.repeat(tokens.astype(np.int64), num_groups),
        query_start=np.array([0, num_tokens], np.int32),
        context_lens=np.array([num_tokens], np.int32),
        block_tables=np.zeros((1, num_groups), np.int32),
        samples=zero,
        sample_rows=zero,
    )
