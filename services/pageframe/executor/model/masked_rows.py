"""Choosing from logits of which a mask lets some tokens through, without touching the others.

Within JSON a mask nearly always lets a few hundred tokens through, or all but a few hundred. What
is listed is the smaller side:

    few allowed      the allowed logits alone, laid side by side      [n, V] ─▶ [n, C]
    few forbidden    minus infinity at the others, put back afterwards
    neither          a copy of the rows, all of it masked

All three choose the same token: the best is the lowest id of equals in each, and weights are whole
numbers, so the forbidden add nothing and the order of sums means nothing (see ``draw``). Which one
is taken is a matter of the row's own mask, never of its neighbours.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# A list longer than this part of the vocabulary takes as long as the whole of it.
_LISTED_PART = 8


@dataclass(frozen=True, slots=True)
class Masked:
    """Masks of some of n rows.

    Attributes:
        index: int64 [m], which of the rows, ascending.
        masks: uint8 [m, B], as ``GrammarMasks.pack`` makes them.
    """

    index: NDArray[np.int64]
    masks: NDArray[np.uint8]

    def of(self, which: NDArray[np.int64]) -> "Masked":
        """Those of the rows int64 [k] of the n, ascending, which are the n from now on."""
        places = np.searchsorted(which, self.index)
        is_kept = np.isin(self.index, which)
        return Masked(places[is_kept], self.masks[is_kept])

    def sides(self, vocab_size: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which masks allow few tokens, and which of the others forbid few: bool [m] each."""
        num_allowed = np.bitwise_count(self.masks.view(np.uint32)).sum(1, dtype=np.int64)
        num_listed = vocab_size // _LISTED_PART
        few_allowed = num_allowed <= num_listed
        return few_allowed, (vocab_size - num_allowed <= num_listed) & ~few_allowed


@dataclass(frozen=True, slots=True)
class Allowed:
    """The few tokens that each of m rows may choose from.

    Attributes:
        values: float32 [m, C], their logits; minus infinity behind a row's last one.
        token_ids: int64 [m, C], ascending in each row.
    """

    values: torch.Tensor
    token_ids: NDArray[np.int64]

    def tokens(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens int64 [m] that stand at ``places`` int64 [m]."""
        return np.take_along_axis(self.token_ids, places[:, None], 1)[:, 0]


def list_allowed(
    logits: torch.Tensor, rows: NDArray[np.int64], masks: NDArray[np.uint8]
) -> Allowed:
    """Lay side by side what masks allow.

    Args:
        logits: float32 [K, V].
        rows: int64 [m], which of the K.
        masks: uint8 [m, B], at least one bit of each set.
    """
    of_row, token_ids = _set_bits(masks)
    num_allowed = np.bincount(of_row, minlength=len(rows))
    places = np.arange(len(of_row)) - np.repeat(np.cumsum(num_allowed) - num_allowed, num_allowed)
    table = np.zeros((len(rows), int(num_allowed.max())), dtype=np.int64)
    table[of_row, places] = token_ids
    device = logits.device
    values = torch.full(table.shape, -torch.inf, dtype=logits.dtype, device=device)
    values[_tensors(device, of_row, places)] = logits[_tensors(device, rows[of_row], token_ids)]
    return Allowed(values, table)


@contextlib.contextmanager
def without_forbidden(
    logits: torch.Tensor, rows: NDArray[np.int64], masks: NDArray[np.uint8]
) -> Iterator[None]:
    """While the block runs, what masks forbid is impossible in ``logits`` itself.

    Args:
        logits: float32 [K, V].
        rows: int64 [m], which of the K.
        masks: uint8 [m, B].
    """
    of_row, token_ids = _set_bits(~masks)
    # Behind the vocabulary a mask has bits that stand for nothing.
    is_token = token_ids < logits.shape[1]
    places = _tensors(logits.device, rows[of_row[is_token]], token_ids[is_token])
    kept = logits[places]
    logits[places] = -torch.inf
    try:
        yield
    finally:
        logits[places] = kept


def is_allowed(masks: NDArray[np.uint8], token_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each mask of uint8 [m, B] lets a token of int64 [m] through."""
    bits = masks[np.arange(len(masks)), token_ids // 8] >> (token_ids % 8).astype(np.uint8)
    return (bits & 1).astype(np.bool_)


def _set_bits(masks: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and number of every bit that is set, row by row, ascending."""
    flat = masks.reshape(-1)
    # Numbers of bytes, then of bits in them: quicker than asking for rows and columns at once.
    num_bytes = np.flatnonzero(flat != 0)
    bits = np.flatnonzero(np.unpackbits(flat[num_bytes], bitorder="little").view(np.bool_))
    return np.divmod(num_bytes[bits // 8] * 8 + bits % 8, masks.shape[1] * 8)


def _tensors(
    device: torch.device, rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
