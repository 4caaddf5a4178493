"""Draws tokens from filtered distributions: one uniform a token, exact whatever the path.

Two ideas carry this module.

*Weights are whole numbers.* A token weighs ``floor(exp((logit - best) / temperature) * 2**40)``,
an int64. Sums of whole numbers do not depend on their order, so a row draws the same token alone
or in any batch, with one thread or many, from the whole vocabulary or from a short list. A token
below 2**-40 of the best one weighs nothing: together such tokens hold less than 2**-40 per
vocabulary entry. Every weight above 2**-17 keeps all bits of its float32.

*Filters are thresholds.* top-k keeps the logits that are at least the k-th best; top-p keeps
those at least as good as the one at which the sum of weights, best first, reaches ``p`` of the
total (of what top-k left); min-p keeps weights that are at least ``min_p`` of the best one's.
So the kept set is "at least the highest threshold", and values that tie are kept or dropped
together: nothing in a distribution tells them apart.

The token is the first one, by id, at which the running sum of kept weights passes
``uniform * total`` (inverse of the cumulative distribution). One uniform is enough for that, and
has to be: the random key has one number per (seed, sample index, position), and a method that
draws one per vocabulary entry (the Gumbel trick) costs V of them, one that draws until it
accepts costs an unknown number.

Where there are compiled CPU kernels they draw, by the same definition (``kernels.cpu.draw``), and
find the best token of logits that nobody edits in the same call; what follows here is the way on a
GPU, and everywhere else.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.executor.model.selection import best_tokens, reduce_blocks, sorted_values
from pageframe.kernels.cpu.draw import CpuDraw

WEIGHT_ONE = 2.0**40
"""The weight of the best token of a row."""

_BLOCK = 256
# Rows of one pass over the vocabulary: their floats and weights together stay near the size of
# a CPU's second-level cache. A GPU takes all rows at once.
_CPU_PASS_ELEMENTS = 1 << 18
# How many best tokens are looked at before the whole row is sorted: enough for nearly every
# nucleus of a language model, and for nearly every top-k.
_NUM_BEST = 128
_NUM_BEST_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """n draws from rows of one logits tensor; parallel arrays.

    Attributes:
        logits: float32 [K, V], shared by all draws.
        maxima: float32 [K], the best logit of each row.
        index: int64 [n], which row each draw is from.
        temperature: float32 [n], above zero.
        top_k: int64 [n], in ``[1, V]``; V keeps all.
        top_p: float64 [n], in ``(0, 1]``; 1 keeps all.
        min_p: float32 [n], in ``[0, 1]``.
        uniforms: float64 [n], in ``[0, 1)``.
        kernels: Who draws instead of PyTorch, where the logits are on the CPU; None for nobody.
    """

    logits: torch.Tensor
    maxima: torch.Tensor
    index: NDArray[np.int64]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float32]
    uniforms: NDArray[np.float64]
    kernels: CpuDraw | None = None

    def __len__(self) -> int:
        return len(self.index)

    def take(self, which: NDArray[np.int64] | slice) -> "Draws":
        """The draws at ``which``, in that order."""
        return replace(
            self,
            index=self.index[which],
            temperature=self.temperature[which],
            top_k=self.top_k[which],
            top_p=self.top_p[which],
            min_p=self.min_p[which],
            uniforms=self.uniforms[which],
        )

    def rows(self) -> torch.Tensor:
        """The logits [n, V] of these draws; without a copy when they are neighbours."""
        first, count = int(self.index[0]), len(self)
        if np.array_equal(self.index, np.arange(first, first + count)):
            return self.logits[first : first + count]
        return self.logits.index_select(0, self.column(self.index).squeeze(1))

    def column(self, array: NDArray[Any]) -> torch.Tensor:
        """A parameter as a tensor [n, 1] beside the logits."""
        return torch.from_numpy(array[:, None]).to(self.logits.device)

    def min_p_column(self) -> torch.Tensor | None:
        """``min_p`` as a tensor [n, 1], or None where it drops nothing."""
        return self.column(self.min_p) if self.min_p.any() else None

    def weights(self, values: torch.Tensor) -> torch.Tensor:
        """``exp((values - best) / temperature)``, float32 [n, C] in [0, 1].

        Every step works on one element at a time, so it rounds alike in every batch.
        """
        scaled = values - self.maxima[self.column(self.index).squeeze(1), None]
        # Dividing by one changes nothing, and temperature 1 is the default.
        if (self.temperature != 1.0).any():
            scaled.div_(self.column(self.temperature))
        return scaled.exp_()


def draw(draws: Draws) -> NDArray[np.int64]:
    """Draw one token per entry.

    Args:
        draws: Rows whose best logit is finite.

    Returns:
        Token ids int64 [n].
    """
    if draws.kernels is not None:
        return draws.kernels.draw(
            draws.logits,
            draws.maxima,
            draws.index,
            temperature=draws.temperature,
            top_k=draws.top_k,
            top_p=draws.top_p,
            min_p=draws.min_p,
            uniforms=draws.uniforms,
        )
    vocab_size = draws.logits.shape[1]
    has_top_k, has_top_p = draws.top_k < vocab_size, draws.top_p < 1.0
    # A huge top-k would make the short list long for its neighbours too.
    is_short = has_top_p | has_top_k | (draws.min_p > 0.0)
    is_short &= ~has_top_k | (draws.top_k < _NUM_BEST_MAX)

    tokens = np.empty(len(draws), dtype=np.int64)
    is_settled = np.zeros(len(draws), dtype=np.bool_)
    short = np.flatnonzero(is_short)
    if short.size:
        tokens[short], is_settled[short] = _draw_from_best(draws.take(short))

    thresholds = np.full(len(draws), -np.inf, dtype=np.float32)
    unsettled = np.flatnonzero((has_top_k | has_top_p) & ~is_settled)
    if unsettled.size:
        thresholds[unsettled] = _thresholds_by_sorting(draws.take(unsettled))
    rest = np.flatnonzero(~is_settled)
    if rest.size:
        tokens[rest] = _draw_from_all(draws.take(rest), thresholds[rest])
    return tokens


def total_weights(draws: Draws) -> torch.Tensor:
    """Sum of all weights of each row, before any filter: int64 [n, 1].

    ``log(total / WEIGHT_ONE) + best / temperature`` is the row's log-sum-exp.
    """
    if draws.kernels is not None:
        totals = draws.kernels.total_weights(
            draws.logits, draws.maxima, draws.index, temperature=draws.temperature
        )
        return torch.from_numpy(totals[:, None])
    return _block_weights(draws).sum(1, keepdim=True)


def _draw_from_best(draws: Draws) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Draw from the best few tokens of each row, and say for which rows those were enough."""
    vocab_size = draws.logits.shape[1]
    has_top_k = draws.top_k < vocab_size
    # One more than is kept: only a value below the threshold proves that nothing is missing.
    longest = int(np.where(has_top_k, draws.top_k + 1, _NUM_BEST).max())
    count = min(-(-longest // 64) * 64, vocab_size)
    values, ids = best_tokens(draws.rows(), count)

    totals = torch.zeros(len(draws), 1, dtype=torch.int64, device=values.device)
    nucleus = np.flatnonzero(~has_top_k & (draws.top_p < 1.0))
    if nucleus.size and count < vocab_size:
        totals[torch.from_numpy(nucleus)] = total_weights(draws.take(nucleus))
    by_top_k, by_top_p = _thresholds(draws, values, totals)
    thresholds = torch.maximum(by_top_k, by_top_p)

    # Nothing outside the list is kept if its worst value is not: a value that is kept may have
    # equals outside. Top-k must be clear of that by itself, for top-p works on its whole set.
    worst, min_p = values[:, -1:], draws.min_p_column()
    is_settled = thresholds > worst
    if min_p is not None:
        is_settled |= draws.weights(worst) < min_p
    is_settled &= (by_top_k > worst) | ~draws.column(has_top_k)
    is_settled |= count == vocab_size

    ids, order = ids.sort(1)
    running = _whole_weights(draws, values.gather(1, order), thresholds, min_p).cumsum(1)
    offset = _first_above(running, _targets(draws, running[:, -1:]))
    return ids.gather(1, offset).squeeze(1).cpu().numpy(), is_settled.squeeze(1).cpu().numpy()


def _thresholds(
    draws: Draws, values: torch.Tensor, totals: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest logit that top-k keeps, and the lowest that top-p keeps of those.

    Args:
        draws: n draws.
        values: float32 [n, C], the best logits of each row, highest first.
        totals: int64 [n, 1], sum of weights of the whole row; read only where C < V and the
            draw has no top-k.

    Returns:
        Two tensors float32 [n, 1]; minus infinity without that filter, and where top-p needs
        more than ``values``.
    """
    vocab_size, count = draws.logits.shape[1], values.shape[1]
    top_k, top_p = draws.column(draws.top_k), draws.column(draws.top_p)
    has_top_k, is_whole = top_k < vocab_size, count == vocab_size
    by_top_k = values.gather(1, (top_k - 1).clamp(max=count - 1)).where(has_top_k, -torch.inf)

    # Top-p works on what top-k left, as if that were the whole distribution.
    running = _whole_weights(draws, values, by_top_k).cumsum(1)
    totals = running[:, -1:].where(has_top_k | is_whole, totals)
    first = (running.double() < top_p * totals.double()).sum(1, keepdim=True)
    is_found = (top_p < 1.0) & (first < count)
    by_top_p = values.gather(1, first.clamp(max=count - 1)).where(is_found, -torch.inf)
    return by_top_k, by_top_p


def _thresholds_by_sorting(draws: Draws) -> NDArray[np.float32]:
    """The higher of both thresholds from all values of each row, a few rows at a time."""
    found = []
    for rows in _passes(draws):
        part = draws.take(rows)
        values = sorted_values(part.rows())
        unused = torch.zeros(len(part), 1, dtype=torch.int64, device=values.device)
        by_top_k, by_top_p = _thresholds(part, values, unused)
        found.append(torch.maximum(by_top_k, by_top_p).squeeze(1).cpu().numpy())
    return np.concatenate(found)


def _draw_from_all(draws: Draws, thresholds: NDArray[np.float32]) -> NDArray[np.int64]:
    """Draw from the whole vocabulary: find the block first, then the token inside it."""
    vocab_size = draws.logits.shape[1]
    floor = draws.column(thresholds) if np.isfinite(thresholds).any() else None
    min_p = draws.min_p_column()
    blocks = _block_weights(draws, floor, min_p)
    running = blocks.cumsum(1)
    targets = _targets(draws, running[:, -1:])
    block = _first_above(running, targets)
    targets = targets - (running.gather(1, block) - blocks.gather(1, block))

    ids = block * _BLOCK + torch.arange(_BLOCK, device=block.device)
    rows = torch.from_numpy(draws.index).to(block.device)[:, None]
    values = draws.logits[rows, ids.clamp(max=vocab_size - 1)].where(ids < vocab_size, -torch.inf)
    weights = _whole_weights(draws, values, floor, min_p)
    offset = _first_above(weights.cumsum(1), targets)
    tokens: NDArray[np.int64] = ids.gather(1, offset).squeeze(1).cpu().numpy()
    return tokens


def _block_weights(
    draws: Draws, thresholds: torch.Tensor | None = None, min_p: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of kept weights of each block of 256 tokens: int64 [n, ceil(V / 256)]."""
    sums = []
    for rows in _passes(draws):
        part = draws.take(rows)
        weights = _whole_weights(
            part,
            part.rows(),
            None if thresholds is None else thresholds[rows],
            None if min_p is None else min_p[rows],
        )
        sums.append(reduce_blocks(weights, _BLOCK, torch.sum))
    return torch.cat(sums)


def _passes(draws: Draws) -> Iterator[slice]:
    """Cut the draws so that what one pass over their vocabulary touches stays in cache."""
    step = len(draws)
    if draws.logits.device.type == "cpu":
        step = max(1, _CPU_PASS_ELEMENTS // draws.logits.shape[1])
    for start in range(0, len(draws), step):
        yield slice(start, start + step)


def _whole_weights(
    draws: Draws,
    values: torch.Tensor,
    thresholds: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights int64 of ``values`` [n, C], zero for what a filter ([n, 1]) drops."""
    weights = draws.weights(values)
    if thresholds is not None:
        weights.masked_fill_(values < thresholds, 0.0)
    if min_p is not None:
        weights.masked_fill_(weights < min_p, 0.0)
    return weights.mul_(WEIGHT_ONE).long()


def _targets(draws: Draws, totals: torch.Tensor) -> torch.Tensor:
    """Whole numbers in ``[0, total)`` that are as far up as the uniforms: int64 [n, 1]."""
    # A total may need more bits than a float64 has, but no uniform is above 1 - 2**-53, and that
    # times a float64 rounds to the float64 before it, which is below the total.
    return (draws.column(draws.uniforms) * totals.double()).long()


def _first_above(running: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Index of the first running sum that is above the target: int64 [n, 1]."""
    return (running <= targets).sum(1, keepdim=True)
