"""The best tokens that beams could go on with, instead of one token chosen.

As in Hugging Face beam search the edits are applied to log-probabilities, not to logits, and what
they leave is not normalised again: only so do scores of different beams stay comparable.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.core.step import Candidates
from pageframe.executor.model.selection import best_tokens


def best_candidates(logprobs: torch.Tensor, counts: NDArray[np.int64]) -> list[Candidates]:
    """The best tokens of each row, best first, equals by id; impossible ones are left out.

    Args:
        logprobs: float32 [n, V] without NaN; minus infinity where a token is impossible.
        counts: int64 [n], how many to name of each row, at most V.
    """
    values, ids = best_tokens(logprobs, int(counts.max(initial=0)))
    best: NDArray[np.float32] = values.cpu().numpy()
    token_ids: NDArray[np.int64] = ids.cpu().numpy()
    order = np.lexsort((token_ids, -best), axis=1)
    best = np.take_along_axis(best, order, 1)
    token_ids = np.take_along_axis(token_ids, order, 1)
    num_possible = np.minimum(np.isfinite(best).sum(1), counts)
    return [
        Candidates(token_ids=token_ids[row, :num].tolist(), logprobs=best[row, :num].tolist())
        for row, num in enumerate(num_possible.tolist())
    ]
