"""Candidates of beams without a model: made of the same hash from which ``sim`` makes tokens.

Rank ``r`` gets the log-probability ``-(r + 1) * (0.5 + u)``, with one ``u`` in ``[0, 1)`` for each
history, so beams compete: now the second best token of one is better than the best of another.
"""

import numpy as np

from pageframe.core.step import Candidates
from pageframe.executor.batch import Int32Array

_HALF = 32
_LOW_HALF = (1 << _HALF) - 1


def sim_candidates(
    drawn: int, count: int, plain_ids: Int32Array, eos_token_id: int, held_back: frozenset[int]
) -> Candidates:
    """The candidates of one history.

    Args:
        drawn: 64 bits that stand for the history.
        count: How many, where there are enough tokens.
        plain_ids: int32 [n], tokens that end nothing.
        eos_token_id: Comes in a place of its own, unless it is -1 or held back.
        held_back: Tokens that must not come.
    """
    high, low = drawn >> _HALF, drawn & _LOW_HALF
    first = (high * plain_ids.size) >> _HALF
    places = np.arange(first, first + min(count + len(held_back), plain_ids.size)) % plain_ids.size
    token_ids = [token_id for token_id in plain_ids[places].tolist() if token_id not in held_back][
        :count
    ]
    if eos_token_id >= 0 and eos_token_id not in held_back:
        token_ids.insert(low % (count + 1), eos_token_id)
    slope = np.float32(0.5 + low / (1 << _HALF))
    logprobs = -np.arange(1, 1 + len(token_ids[:count]), dtype=np.float32) * slope
    return Candidates(token_ids=token_ids[:count], logprobs=logprobs.tolist())
