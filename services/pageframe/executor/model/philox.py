"""Philox4x32-10: random numbers as a pure function of a key and a counter.

After Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). There
is no state to save, restore or share: token ``position`` of sample ``sample_index`` under ``seed``
has its number, whoever asks, in whatever order, on whatever machine.

    key      seed, low word | seed, high word
    counter  position | sample index | 0 | 0

The two zero words are free for further draws at one position.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 10
_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# Rows of the 2 x K lanes: (counter 0, key 0) and (counter 2, key 1).
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
# Key added in each round, wrapped to 32 bits: 10 x 2 x 1.
_KEY_STEPS = (
    np.arange(_NUM_ROUNDS, dtype=np.uint64)[:, None, None]
    * np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
) & _MASK


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds over K counters at once.

    Args:
        counter: uint64 [4, K], each below 2**32.
        key: uint64 [2, K], each below 2**32.

    Returns:
        uint64 [4, K], each below 2**32.
    """
    keys = (key[None] + _KEY_STEPS) & _MASK
    # Words 0 and 2 are multiplied, words 1 and 3 are mixed in: two lanes, not four names.
    even, odd = counter[0::2], counter[1::2]
    for round_key in keys:
        product = even * _MULTIPLIERS
        even, odd = (product >> _HALF)[::-1] ^ odd ^ round_key, (product & _MASK)[::-1]
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniform(
    seed: NDArray[np.uint64], sample_index: NDArray[Any], position: NDArray[Any]
) -> NDArray[np.float64]:
    """One number in [0, 1) for each of K (seed, sample index, position) triples.

    Args:
        seed: uint64 [K].
        sample_index: integers [K] in ``[0, 2**32)``.
        position: integers [K] in ``[0, 2**32)``.

    Returns:
        float64 [K], multiples of 2**-53.
    """
    counter = np.zeros((4, len(seed)), dtype=np.uint64)
    counter[0], counter[1] = position, sample_index
    words = philox4x32(counter, np.stack((seed & _MASK, seed >> _HALF)))
    # 27 + 26 bits: all that a float64 holds between 0 and 1.
    bits = ((words[0] >> np.uint64(5)) << np.uint64(26)) | (words[1] >> np.uint64(6))
    numbers: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers
