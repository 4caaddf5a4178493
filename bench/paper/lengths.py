"""How long prompts and replies are: real ShareGPT exchanges, and synthetic ones like Alpaca's.

ShareGPT: first human turn and first reply of each conversation, counted with the tokeniser of the
embedded model; exchanges longer than the 2,048 tokens of OPT are left out, as in the paper. The
counts are kept in a file, which ``python -m bench.paper.make_lengths`` makes again.

The paper's own selection is not published. Ours has a fifth of the conversations, with other
prompts and another tokeniser: 123 tokens in and 330 out on average, where the paper has 161 and
338. ``like_paper`` draws real exchanges with slightly different weights, such that both means are
the paper's. What is compared with the paper's figures uses those; the plain ones stand beside.

Alpaca: the data set is not used. Lengths are drawn from log-normal distributions with the means of
the paper (figure 11); their spread is an assumption, stated below.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pageframe.core.errors import PreconditionError
from pageframe.executor.batch import Int32Array

LENGTHS_PATH = Path(__file__).resolve().parents[1] / "data" / "sharegpt_lengths.npz"
MAX_MODEL_LEN = 2048
"""Of OPT (Kwon et al., SOSP 2023, section 6.1)."""

# Figure 11 of the paper.
_SHAREGPT_MEANS = (161.31, 337.99)
_ALPACA_MEAN_PROMPT = 19.31
_ALPACA_MEAN_OUTPUT = 58.45
# Assumed: standard deviation of the logarithm. Prompts are instructions of one sentence, so they
# vary little; replies reach from one word to a page.
_ALPACA_SIGMA_PROMPT = 0.5
_ALPACA_SIGMA_OUTPUT = 0.9

_NUM_PROMPT_BINS = 32
_NUM_NEWTON_STEPS = 50
# Of a mean, in parts of the longest exchange.
_ERROR_MAX = 1e-9


@dataclass(frozen=True, slots=True)
class Lengths:
    """Requests by their lengths.

    Attributes:
        name: Of the data set.
        num_prompt_tokens: int32 [N], at least 1.
        num_output_tokens: int32 [N], at least 1; with the prompt at most ``MAX_MODEL_LEN``.
    """

    name: str
    num_prompt_tokens: Int32Array
    num_output_tokens: Int32Array

    def __len__(self) -> int:
        return len(self.num_prompt_tokens)

    def sample(self, num_requests: int, rng: np.random.Generator) -> "Lengths":
        """Requests in random order, none twice before all have been taken."""
        rounds = -(-num_requests // len(self))
        order = np.concatenate([rng.permutation(len(self)) for _ in range(rounds)])[:num_requests]
        return Lengths(self.name, self.num_prompt_tokens[order], self.num_output_tokens[order])

    def spread(self, num_requests: int, rng: np.random.Generator) -> "Lengths":
        """A sample that is nearly even, in random order; it needs far fewer requests.

        All are put into bins by prompt and walked with the outputs in rising and falling order by
        turns; of each n-th part of the walk one is drawn: stratified sampling along a serpentine.
        What blocks saved by sharing, with heavy tails in both lengths, miss their mean by is a
        half to a sixth of that of a plain sample.
        """
        ranks = np.empty(len(self), dtype=np.int64)
        ranks[np.argsort(self.num_prompt_tokens, kind="stable")] = np.arange(len(self))
        bins = ranks * _NUM_PROMPT_BINS // len(self)
        outputs = np.where(bins % 2 == 0, self.num_output_tokens, -self.num_output_tokens)
        walk = np.lexsort((outputs, bins))
        places = (np.arange(num_requests) + rng.random(num_requests)) * len(self) / num_requests
        order = rng.permutation(walk[places.astype(np.int64)])
        return Lengths(self.name, self.num_prompt_tokens[order], self.num_output_tokens[order])


def sharegpt(path: Path = LENGTHS_PATH) -> Lengths:
    """The real lengths, without empty turns and without what OPT could not hold."""
    with np.load(path, allow_pickle=False) as arrays:
        prompt, output = arrays["num_prompt_tokens"], arrays["num_output_tokens"]
    fits = (prompt + output <= MAX_MODEL_LEN) & (prompt > 0) & (output > 0)
    return Lengths("ShareGPT", prompt[fits].astype(np.int32), output[fits].astype(np.int32))


def tilt(lengths: Lengths, mean_prompt: float, mean_output: float) -> NDArray[np.float64]:
    """Weights of the requests, float64 [N], that add up to 1 and give these mean lengths.

    Of all such weights they are the ones nearest to equal (least relative entropy; Csiszár, Annals
    of Probability 1975): the exponential of a weighted sum of both lengths.

    Raises:
        PreconditionError: MEANS_OUT_OF_REACH, when the requests cannot have these means.
    """
    columns = (lengths.num_prompt_tokens - mean_prompt, lengths.num_output_tokens - mean_output)
    excess = np.stack(columns, axis=1) / MAX_MODEL_LEN
    slope = np.zeros(2)
    for _ in range(_NUM_NEWTON_STEPS):
        exponents = excess @ slope
        weights: NDArray[np.float64] = np.exp(exponents - exponents.max())
        weights /= weights.sum()
        error = weights @ excess
        if np.abs(error).max() < _ERROR_MAX:
            return weights
        curvature = (excess * weights[:, None]).T @ excess - np.outer(error, error)
        # Means that cannot be had drive the weights to a corner, where there is no curvature left.
        slope -= np.linalg.lstsq(curvature, error)[0]
    raise PreconditionError(
        "MEANS_OUT_OF_REACH",
        f"no weights give {mean_prompt} tokens in and {mean_output} out on average",
        mean_prompt=mean_prompt,
        mean_output=mean_output,
    )


def like_paper(lengths: Lengths, seed: int) -> Lengths:
    """As many real exchanges, drawn such that their means are those of the paper.

    The draw is systematic: each exchange comes as often as its weight says, rounded up or down.
    """
    weights = tilt(lengths, *_SHAREGPT_MEANS)
    offset = np.random.default_rng(seed).random()
    order = np.searchsorted(np.cumsum(weights), (np.arange(len(lengths)) + offset) / len(lengths))
    order = np.minimum(order, len(lengths) - 1)
    return Lengths(
        f"{lengths.name}, means of the paper",
        lengths.num_prompt_tokens[order],
        lengths.num_output_tokens[order],
    )


def alpaca_like(num_requests: int, seed: int) -> Lengths:
    """Synthetic lengths with Alpaca's means."""
    rng = np.random.default_rng(seed)
    prompt = _log_normal(_ALPACA_MEAN_PROMPT, _ALPACA_SIGMA_PROMPT, num_requests, rng)
    output = _log_normal(_ALPACA_MEAN_OUTPUT, _ALPACA_SIGMA_OUTPUT, num_requests, rng)
    output = np.minimum(output, MAX_MODEL_LEN - prompt)
    return Lengths("Alpaca-like", prompt, output)


def _log_normal(mean: float, sigma: float, size: int, rng: np.random.Generator) -> Int32Array:
    """Whole numbers from 1 to half of ``MAX_MODEL_LEN`` with about this mean."""
    drawn: NDArray[np.float64] = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, size)
    return np.clip(np.rint(drawn), 1, MAX_MODEL_LEN // 2).astype(np.int32)
