"""Choosing tokens from logits that are edited first, each row in its cheapest way.

    a mask only ─┬─ greedy, and the best is allowed ──▶ the best, and nothing is edited
                 ├─ few allowed ──────────────────────▶ from a list of them
                 ├─ few forbidden ────────────────────▶ from the logits without them
    all else ────┴────────────────────────────────────▶ from a copy that is edited

Which way a row goes depends on that row alone, and all ways choose the same token; see
``masked_rows``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.executor.batch import Int32Array
from pageframe.executor.model.logit_edits import LogitEdits
from pageframe.executor.model.masked_rows import (
    Masked,
    is_allowed,
    list_allowed,
    without_forbidden,
)
from pageframe.executor.model.selection import check_finite

DrawAt = Callable[[torch.Tensor, torch.Tensor, NDArray[np.int64], NDArray[np.int64]], "Int64Array"]
"""Draws from rows of logits [m, C] with maxima [m]: from which of the m, for which samples."""
BestOf = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""The highest of each row of logits [m, C], and the lowest place of it; see ``best_token``."""
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Turn:
    """Samples of one step whose logits are edited: arrays of all K, and which of them.

    Attributes:
        logits: float32 [K, V]; unchanged when tokens are chosen.
        maxima: float32 [K], the best logit before any edit.
        best_ids: int64 [K], whose it is.
        index: int64 [n], which of the K, no sequence twice.
        rows: int32 [K].
        positions: int32 [K], of the tokens that are chosen.
        is_holding_back: bool [K].
        is_drawn: bool [K], the others get their best token.
        best: Finds best tokens.
        draw: Draws for those that are drawn.
    """

    logits: torch.Tensor
    maxima: torch.Tensor
    best_ids: Int64Array
    index: Int64Array
    rows: Int32Array
    positions: Int32Array
    is_holding_back: NDArray[np.bool_]
    is_drawn: NDArray[np.bool_]
    best: BestOf
    draw: DrawAt

    def take(self, which: Int64Array) -> "Turn":
        """Some of the n."""
        return replace(self, index=self.index[which])


def choose_edited(edits: LogitEdits, turn: Turn) -> Int64Array:
    """Choose n tokens.

    Raises:
        InternalError: LOGITS_NOT_FINITE, where edits leave a row without a finite best logit.
    """
    rows = turn.rows[turn.index].tolist()
    for row, position in zip(rows, turn.positions[turn.index].tolist(), strict=True):
        edits.check_position(row, position)
    masked = edits.masks(rows, turn.is_holding_back[turn.index])
    tokens = np.empty(len(rows), dtype=np.int64)
    is_left = np.ones(len(rows), dtype=np.bool_)
    for way, which in _ways(edits, turn, masked):
        places = masked.index[which]
        tokens[places] = way(turn.take(places), masked.masks[which])
        is_left[places] = False
    left = np.flatnonzero(is_left)
    if left.size:
        tokens[left] = _from_copy(edits, turn.take(left), masked.of(left))
    return tokens


def _ways(
    edits: LogitEdits, turn: Turn, masked: Masked
) -> list[tuple[Callable[[Turn, NDArray[np.uint8]], Int64Array], Int64Array]]:
    """Which masks go which way without a copy; none goes two."""
    if not masked.index.size:
        return []
    samples = turn.index[masked.index]
    is_alone = np.array([edits.has_mask_only(row) for row in turn.rows[samples].tolist()])
    few_allowed, few_forbidden = masked.sides(turn.logits.shape[1])
    is_best = ~turn.is_drawn[samples] & is_allowed(masked.masks, turn.best_ids[samples])
    ways = (
        (_best, is_alone & is_best),
        (_from_allowed, is_alone & few_allowed & ~is_best),
        (_from_others, is_alone & few_forbidden & ~is_best),
    )
    return [(way, np.flatnonzero(which)) for way, which in ways if which.any()]


def _best(turn: Turn, _masks: NDArray[np.uint8]) -> Int64Array:
    best: Int64Array = turn.best_ids[turn.index]
    return best


def _from_allowed(turn: Turn, masks: NDArray[np.uint8]) -> Int64Array:
    allowed = list_allowed(turn.logits, turn.index, masks)
    return allowed.tokens(_from(allowed.values, turn))


def _from_others(turn: Turn, masks: NDArray[np.uint8]) -> Int64Array:
    tokens: Int64Array = turn.best_ids[turn.index]
    maxima = turn.maxima.clone()
    with without_forbidden(turn.logits, turn.index, masks):
        lost = np.flatnonzero(~is_allowed(masks, tokens))
        if lost.size:
            where = torch.from_numpy(turn.index[lost]).to(maxima.device)
            best, best_ids = turn.best(turn.logits[where])
            check_finite(best, turn.rows[turn.index[lost]])
            maxima[where] = best
            tokens[lost] = best_ids.cpu().numpy()
        drawn = np.flatnonzero(turn.is_drawn[turn.index])
        if drawn.size:
            samples = turn.index[drawn]
            tokens[drawn] = turn.draw(turn.logits, maxima, samples, samples)
    return tokens


def _from_copy(edits: LogitEdits, turn: Turn, masked: Masked) -> Int64Array:
    logits = turn.logits[torch.from_numpy(turn.index).to(turn.logits.device)]
    rows = turn.rows[turn.index].tolist()
    edits.apply(logits, rows, turn.is_holding_back[turn.index], masked)
    return _from(logits, turn)


def _from(values: torch.Tensor, turn: Turn) -> Int64Array:
    """Where in ``values`` [n, C] the tokens of a turn's n samples stand."""
    maxima, best = turn.best(values)
    check_finite(maxima, turn.rows[turn.index])
    places: Int64Array = best.cpu().numpy()
    drawn = np.flatnonzero(turn.is_drawn[turn.index])
    if drawn.size:
        places[drawn] = turn.draw(values, maxima, drawn, turn.index[drawn])
    return places
