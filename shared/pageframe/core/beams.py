"""What a caller may ask of a beam search, and what is refused."""

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

from pageframe.core.errors import InvalidRequestError
from pageframe.core.limits import LIMITS
from pageframe.core.sampling import SamplingParams


@enum.unique
class EarlyStopping(enum.IntEnum):
    """When a search is over, once as many hypotheses have ended as there are beams.

    Values equal those of ``pageframe.v1.EarlyStopping``. In Hugging Face ``generate`` they are
    called ``False``, ``True`` and ``"never"``.
    """

    HEURISTIC = 1
    ALWAYS = 2
    NEVER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamParams:
    """A beam search over the model's distribution, as Hugging Face ``generate`` does it.

    A hypothesis is scored by the sum of its tokens' log-probabilities, divided by its length in
    tokens to the power of ``length_penalty``. One beam is greedy decoding.

    Attributes:
        num_beams: Hypotheses that are followed side by side, in ``[1, 64]``.
        length_penalty: Above 0 favours long outputs, below 0 short ones; in ``[-10, 10]``.
        early_stopping: When the search is over.
        num_return: Outputs to return, best first, in ``[1, num_beams]``.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC
    num_return: int = 1

    def validate(self, sampling: SamplingParams) -> None:
        """Check every field, and that ``sampling`` asks for nothing that a search cannot do.

        Temperature 1 is the model's own distribution and 0 draws nothing: both fit.

        Raises:
            InvalidRequestError: NUM_BEAMS_OUT_OF_RANGE, NUM_RETURN_OUT_OF_RANGE,
                LENGTH_PENALTY_OUT_OF_RANGE, BEAMS_WITH_SAMPLING naming the parameter, or
                GRAMMAR_WITH_FIELD.
        """
        num_beams, num_return = self.num_beams, self.num_return
        if not 1 <= num_beams <= LIMITS.num_beams_max:
            raise InvalidRequestError(
                "NUM_BEAMS_OUT_OF_RANGE",
                f"num_beams is {num_beams}; it must lie in [1, {LIMITS.num_beams_max}]",
                num_beams=num_beams,
                minimum=1,
                maximum=LIMITS.num_beams_max,
            )
        if not 1 <= num_return <= num_beams:
            raise InvalidRequestError(
                "NUM_RETURN_OUT_OF_RANGE",
                f"num_return is {num_return}; it must lie in [1, {num_beams}], the number of beams",
                num_return=num_return,
                minimum=1,
                maximum=num_beams,
            )
        bound = LIMITS.length_penalty_max
        if math.isnan(self.length_penalty) or abs(self.length_penalty) > bound:
            raise InvalidRequestError(
                "LENGTH_PENALTY_OUT_OF_RANGE",
                f"length_penalty is {self.length_penalty}; it must lie in [-{bound}, {bound}]",
                length_penalty=self.length_penalty,
                minimum=-bound,
                maximum=bound,
            )
        _check_nothing_drawn(sampling)
        if sampling.grammar is not None:
            raise InvalidRequestError(
                "GRAMMAR_WITH_FIELD",
                f"beam_search is given; an output in the form of a "
                f"{sampling.grammar.form.value} goes without it",
                field="beam_search",
            )

    def check_vocabulary(
        self, sampling: SamplingParams, vocab_size: int, eos_token_ids: Iterable[int]
    ) -> None:
        """Check that the first step has a token for every beam to go on with.

        Raises:
            InvalidRequestError: NUM_BEAMS_OUT_OF_RANGE.
        """
        num_tokens = vocab_size - len(ending_tokens(sampling, eos_token_ids))
        if self.num_beams > num_tokens:
            raise InvalidRequestError(
                "NUM_BEAMS_OUT_OF_RANGE",
                f"num_beams is {self.num_beams}; the vocabulary has {num_tokens} tokens that end "
                "no output",
                num_beams=self.num_beams,
                minimum=1,
                maximum=num_tokens,
            )


def ending_tokens(sampling: SamplingParams, eos_token_ids: Iterable[int]) -> frozenset[int]:
    """Tokens that end an output, the model's own included."""
    own = () if sampling.ignore_eos else eos_token_ids
    return frozenset(sampling.stop_token_ids).union(own)


def _check_nothing_drawn(sampling: SamplingParams) -> None:
    is_neutral = {
        "temperature": sampling.temperature in (0.0, 1.0),
        "top_k": sampling.top_k == 0,
        "top_p": sampling.top_p == 1.0,
        "min_p": sampling.min_p == 0.0,
        "num_logprobs": sampling.num_logprobs < 0,
    }
    for name, is_fine in is_neutral.items():
        if not is_fine:
            value = getattr(sampling, name)
            raise InvalidRequestError(
                "BEAMS_WITH_SAMPLING",
                f"{name} is {value}; a beam search draws nothing and reports no tokens beside it, "
                "leave it out",
                field=name,
                value=value,
            )
