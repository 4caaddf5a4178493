"""Which tokens a sequence holds, and how often: what penalties are computed from."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SPARE = 64


class TokenHistory:
    """Distinct tokens of one sequence with their number of occurrences in the output.

    It replaces a row of counts as wide as the vocabulary: memory and work grow with the distinct
    tokens of the sequence, and recording one token is O(1).

    Args:
        token_ids: int32 [n], all known tokens: prompt, then output.
        num_prompt_tokens: How many of them are prompt.
    """

    def __init__(self, token_ids: NDArray[np.int32], num_prompt_tokens: int) -> None:
        distinct, place = np.unique(token_ids, return_inverse=True)
        self.num_tokens = len(token_ids)
        self._size = len(distinct)
        self._token_ids = np.zeros(self._size + _SPARE, dtype=np.int64)
        self._token_ids[: self._size] = distinct
        self._output_counts = np.zeros(self._size + _SPARE, dtype=np.float32)
        output = place[num_prompt_tokens:]
        self._output_counts[: self._size] = np.bincount(output, minlength=self._size)
        self._place = {token_id: index for index, token_id in enumerate(distinct.tolist())}

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Distinct tokens of prompt and output, int64 [d]; a view, valid until ``record``."""
        return self._token_ids[: self._size]

    @property
    def output_counts(self) -> NDArray[np.float32]:
        """Occurrences in the output of each of ``token_ids``, float32 [d]; a view."""
        return self._output_counts[: self._size]

    def record(self, token_id: int) -> None:
        """Count one more output token."""
        place = self._place.setdefault(token_id, self._size)
        if place == self._size:
            if place == len(self._token_ids):
                self._token_ids = _twice(self._token_ids)
                self._output_counts = _twice(self._output_counts)
            self._token_ids[place] = token_id
            self._size += 1
        self._output_counts[place] += 1.0
        self.num_tokens += 1


def _twice(array: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate((array, np.zeros_like(array)))
