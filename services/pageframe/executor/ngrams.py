"""Finds where the last tokens of each sequence stood before: the longest n-gram, n = 4, 3, 2.

Text that summarises, edits or answers from a prompt repeats pieces of it, and so does text that
repeats itself; what followed then is a good guess at what follows now (prompt lookup: Saxena, 2023,
github.com/apoorvumang/prompt-lookup-decoding).

The simple thing is a dictionary for each sequence: three entries for each token of each sequence
and step, half a millisecond of Python for 256 of them. Here all rows share one array of places

    places[row, n, hash of an n-gram] = the position behind the place where it stood last

and a step over all rows is a handful of array instructions. A place is only a hint: the tokens
there are compared with the last ones, so n-grams that fall on one hash, and what an earlier
sequence left behind in the row, can hide a place but never name a wrong one. Nothing is cleared.

A sequence's n-grams are entered when the token behind them is known, each once.
"""

import numpy as np
from numpy.typing import NDArray

from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.sequence_table import SequenceTable

NGRAM_SIZES = (2, 3, 4)
"""Of what is found the longest counts."""

_NUM_PLACES_MAX = 1 << 14
_LONGEST = NGRAM_SIZES[-1]
_SIZES: NDArray[np.int64] = np.array(NGRAM_SIZES)
_INDICES: NDArray[np.int64] = np.arange(len(NGRAM_SIZES))
_BACK: NDArray[np.int64] = np.arange(1, _LONGEST + 1)
_IS_OUTSIDE: NDArray[np.bool_] = _SIZES[:, np.newaxis] < _BACK
# Odd factors, one for each token of an n-gram, and one that mixes their sum into the highest bits
# (Knuth's multiplicative hashing).
_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93],
    dtype=np.uint64,
)
_FACTOR = np.uint64(0xFF51AFD7ED558CCD)


class NgramIndex:
    """Last places of n-grams, by row.

    Args:
        num_rows: Rows are in ``[0, num_rows)``.
        max_model_len: Most tokens of one sequence.
    """

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        num_bits = (min(_NUM_PLACES_MAX, max(max_model_len, 2)) - 1).bit_length()
        self._shift = np.uint64(64 - num_bits)
        # Memory is taken as rows are written.
        self._places: Int32Array = np.zeros(
            (num_rows, len(NGRAM_SIZES), 1 << num_bits), dtype=np.int32
        )
        self._num_entered: Int32Array = np.zeros(num_rows, dtype=np.int32)

    def begin(self, rows: Int32Array) -> None:
        """Other sequences stand in ``rows`` now."""
        self._num_entered[rows] = 0

    def enter(self, sequences: SequenceTable, rows: Int32Array) -> None:
        """Enter n-grams of ``rows`` that are new since the last time, and not at the very end."""
        first = np.maximum(self._num_entered[rows] + 1, NGRAM_SIZES[0])
        num_new = np.maximum(sequences.num_tokens[rows] - first, 0)
        self._num_entered[rows] = np.maximum(sequences.num_tokens[rows] - 1, 0)
        total = int(num_new.sum())
        if not total:
            return
        row_of = np.repeat(rows, num_new)[:, np.newaxis]
        ends = np.arange(total) - np.repeat(np.cumsum(num_new) - num_new - first, num_new)
        windows = _windows(sequences, row_of, ends)
        # Of one n-gram that stands twice, the later place is written last. Where a row begins there
        # are no n-grams yet; what is written for them is a wrong hint.
        self._places[row_of, _INDICES, self._hashes(windows)] = ends[:, np.newaxis]

    def find(
        self, sequences: SequenceTable, rows: Int32Array
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the last tokens of ``rows`` stood before.

        Returns:
            The position behind that place, 0 where there is none, and which of ``NGRAM_SIZES`` it
            was: int64 [n] each.
        """
        ends = sequences.num_tokens[rows].astype(np.int64)
        column = rows[:, np.newaxis]
        windows = _windows(sequences, column, ends)
        places = self._places[column, _INDICES, self._hashes(windows)].astype(np.int64)
        # Beside the last tokens, those before each place: [n, sizes, tokens].
        there = sequences.tokens[column[:, np.newaxis], _clip(places[:, :, np.newaxis] - _BACK)]
        is_found = ((there == windows[:, np.newaxis]) | _IS_OUTSIDE).all(axis=2)
        is_found &= (
            (places >= _SIZES) & (places < ends[:, np.newaxis]) & (ends[:, np.newaxis] >= _SIZES)
        )
        best = _INDICES[-1] - is_found[:, ::-1].argmax(axis=1)
        found = np.take_along_axis(places * is_found, best[:, np.newaxis], 1)[:, 0]
        return found, best

    def _hashes(self, windows: Int32Array) -> NDArray[np.int64]:
        """Of the n-grams at the ends of windows [n, longest], for each size: int64 [n, sizes]."""
        sums = ((windows.astype(np.uint64) + np.uint64(1)) * _FACTORS).cumsum(axis=1)
        return ((sums[:, NGRAM_SIZES[0] - 1 :] * _FACTOR) >> self._shift).astype(np.int64)


def _windows(sequences: SequenceTable, column: Int32Array, ends: NDArray[np.int64]) -> Int32Array:
    """The last tokens before ``ends`` [n], the last one first: int32 [n, longest].

    Before the first token of a row there are tokens that mean nothing.
    """
    windows: Int32Array = sequences.tokens[column, _clip(ends[:, np.newaxis] - _BACK)]
    return windows


def _clip(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    clipped: NDArray[np.int64] = np.maximum(positions, 0, out=positions)
    return clipped
