"""Which sequences end with the token they have just got; array comparisons over rows.

A model's own end-of-sequence tokens and a caller's stop tokens end a sequence in the same way and
under the same condition, so each row has one list of ending tokens, and there is one comparison.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.executor.batch import Int32Array

_NO_TOKEN = -1
_NUM_ENDING_TOKENS_MIN = 4
_TOKENS_MAX = 2**31 - 1


class FinishRules:
    """When each row's sequence ends.

    All bounds count tokens from the first of the prompt, so a sequence that was preempted, or whose
    output came along with its announcement, ends where it would have ended anyway.
    """

    def __init__(self, num_rows: int, *, max_model_len: int, eos_token_ids: Sequence[int]) -> None:
        self._max_model_len = max_model_len
        self._eos_token_ids = tuple(eos_token_ids)
        width = max(_NUM_ENDING_TOKENS_MIN, len(self._eos_token_ids))
        self._ending_tokens: Int32Array = np.full((num_rows, width), _NO_TOKEN, dtype=np.int32)
        self._num_tokens_min: Int32Array = np.zeros(num_rows, dtype=np.int32)
        self._num_tokens_max: Int32Array = np.zeros(num_rows, dtype=np.int32)

    def admit(self, row: int, sampling: SamplingParams, num_prompt_tokens: int) -> None:
        """Set the rules of a row."""
        ending = sampling.stop_token_ids
        if not sampling.ignore_eos:
            ending = self._eos_token_ids + ending
        self._widen(len(ending))
        self._ending_tokens[row] = _NO_TOKEN
        self._ending_tokens[row, : len(ending)] = ending
        # With a grammar the sampler alone holds ends back: only it knows when nothing else is left.
        num_min = 0 if sampling.grammar is not None else num_prompt_tokens + sampling.min_tokens
        num_max = num_prompt_tokens + sampling.max_tokens
        self._num_tokens_min[row] = min(num_min, _TOKENS_MAX)
        self._num_tokens_max[row] = min(num_max, self._max_model_len)

    def reasons(
        self, rows: NDArray[np.integer], num_tokens: Int32Array, token_ids: Int32Array
    ) -> NDArray[np.uint8]:
        """``FinishReason`` of each row: uint8 [n].

        Args:
            rows: [n], rows that got a token.
            num_tokens: int32 [n], their known tokens, the new one included.
            token_ids: int32 [n], the new tokens.
        """
        is_ending = (self._ending_tokens[rows] == token_ids[:, np.newaxis]).any(axis=1)
        has_stopped = is_ending & (num_tokens >= self._num_tokens_min[rows])
        reasons = np.zeros(len(rows), dtype=np.uint8)
        reasons[num_tokens >= self._num_tokens_max[rows]] = FinishReason.LENGTH
        reasons[has_stopped] = FinishReason.STOP
        return reasons

    def num_tokens_left(self, rows: NDArray[np.integer], num_tokens: Int32Array) -> Int32Array:
        """How many more tokens each of ``rows`` can get that has ``num_tokens``: int32 [n]."""
        num_left: Int32Array = self._num_tokens_max[rows] - num_tokens
        return num_left

    def _widen(self, width: int) -> None:
        num_rows, old_width = self._ending_tokens.shape
        if width > old_width:
            widened: Int32Array = np.full((num_rows, width), _NO_TOKEN, dtype=np.int32)
            widened[:, :old_width] = self._ending_tokens
            self._ending_tokens = widened
