"""Log-probabilities of chosen and best tokens under the model's own distribution.

Natural logarithm of the softmax of the logits as the model gave them: before penalties, bias,
temperature and filters.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.core.step import TokenLogprobs
from pageframe.executor.model.draw import WEIGHT_ONE, Draws, total_weights
from pageframe.executor.model.selection import best_tokens
from pageframe.kernels.cpu.draw import CpuDraw

# More than the most that may be asked for, so that ties at the end of a list are seen.
_NUM_BEST = 64


def token_logprobs(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    index: NDArray[np.int64],
    token_ids: NDArray[np.int64],
    num_best: NDArray[np.int64],
    kernels: CpuDraw | None = None,
) -> list[TokenLogprobs]:
    """Describe one token of each of n rows of logits, and the best tokens beside it.

    Args:
        logits: float32 [K, V].
        maxima: float32 [K], the best logit of each row, finite.
        index: int64 [n], which rows.
        token_ids: int64 [n], the token of each of them.
        num_best: int64 [n], how many best tokens to list; equals are listed by id.
        kernels: Who sums weights instead of PyTorch; see ``Draws``.

    Returns:
        n descriptions; probabilities are computed in float64 from float32 logits.
    """
    num_rows = len(index)
    plain = Draws(
        logits=logits,
        maxima=maxima,
        index=index,
        temperature=np.ones(num_rows, dtype=np.float32),
        top_k=np.full(num_rows, logits.shape[1]),
        top_p=np.ones(num_rows),
        min_p=np.zeros(num_rows, dtype=np.float32),
        uniforms=np.zeros(num_rows),
        kernels=kernels,
    )
    rows = plain.column(index).squeeze(1)
    best_logits = maxima[rows].double().cpu().numpy()
    totals = total_weights(plain).squeeze(1).cpu().numpy()
    log_totals = best_logits + np.log(totals / WEIGHT_ONE)
    chosen = logits[rows, plain.column(token_ids).squeeze(1)].double().cpu().numpy()
    best_ids, best_values = _best(plain.rows(), int(num_best.max(initial=0)))
    best_logprobs = best_values - log_totals[:, None]
    return [
        TokenLogprobs(
            token_id=int(token_ids[place]),
            logprob=float(chosen[place] - log_totals[place]),
            top_token_ids=best_ids[place, :count].tolist(),
            top_logprobs=best_logprobs[place, :count].tolist(),
        )
        for place, count in enumerate(num_best.tolist())
    ]


def _best(logits: torch.Tensor, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and logits of the ``count`` best tokens [n, count], equals by ascending id."""
    vocab_size = logits.shape[1]
    count = min(count, vocab_size)
    if count == 0:
        return np.empty((len(logits), 0), np.int64), np.empty((len(logits), 0))
    num_candidates = min(_NUM_BEST, vocab_size)
    assert count <= num_candidates, f"{count} best tokens asked of {num_candidates} candidates"
    found = best_tokens(logits, num_candidates)
    values, ids = found[0].double().cpu().numpy(), found[1].cpu().numpy()
    order = np.lexsort((ids, -values), axis=1)[:, :count]
    ids, best = np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
    if num_candidates < vocab_size:
        # Which of the tokens equal to the last candidate are candidates is not defined.
        for row in np.flatnonzero(best[:, -1] == values[:, -1]).tolist():
            ordered = logits[row].sort(descending=True, stable=True)
            ids[row] = ordered.indices[:count].cpu().numpy()
            best[row] = ordered.values[:count].double().cpu().numpy()
    return ids, best
