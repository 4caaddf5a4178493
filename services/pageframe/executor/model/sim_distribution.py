"""Log-probabilities of the distribution that the hash of ``sim`` stands for."""

import numpy as np

from pageframe.core.limits import LIMITS
from pageframe.core.step import TokenLogprobs
from pageframe.executor.batch import Int32Array


class Distribution:
    """The log-probabilities of all tokens, which are the same at every position.

    Args:
        plain_ids: int32 [n], tokens that end nothing.
        eos_token_ids: Tokens that end a sequence; only the first is ever sampled.
        eos_probability: How likely that one is.
    """

    def __init__(
        self, plain_ids: Int32Array, eos_token_ids: list[int], eos_probability: float
    ) -> None:
        with np.errstate(divide="ignore"):
            self._plain = float(np.log((1 - eos_probability) / plain_ids.size))
            eos = [float(np.log(eos_probability)), *([-np.inf] * len(eos_token_ids[1:]))]
        self._eos = dict(zip(eos_token_ids, eos, strict=False))
        known = [
            (token_id, self._plain) for token_id in plain_ids[: LIMITS.num_logprobs_max].tolist()
        ]
        self._best = sorted([*known, *self._eos.items()], key=lambda pair: (-pair[1], pair[0]))

    def describe(self, token_id: int, num_best: int) -> TokenLogprobs:
        """The token's own log-probability and the ``num_best`` best ones, equals by id."""
        best = self._best[:num_best]
        return TokenLogprobs(
            token_id=token_id,
            logprob=self._eos.get(token_id, self._plain),
            top_token_ids=[token_id for token_id, _ in best],
            top_logprobs=[logprob for _, logprob in best],
        )
