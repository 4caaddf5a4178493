"""What the gateway tells a caller, free of any wire: a header, deltas, one end for each sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pageframe.core.request import Completion, RateLevels
from pageframe.core.step import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Comes first; tells what is needed to refer to the generation or to resume it.

    Attributes:
        request_id: Its name, given or made.
        seed: First word of the random key, given or picked.
        trace_id: 32 hexadecimal digits; empty when not traced.
        num_prompt_tokens: Tokens of the prompt.
        model: Name of the model.
    """

    request_id: str
    seed: int
    trace_id: str
    num_prompt_tokens: int
    model: str


@dataclass(frozen=True, slots=True)
class RatesLeft:
    """Comes ahead of the first output where the tenant has rates.

    Attributes:
        levels: How full they are, right behind this request.
    """

    levels: RateLevels


class OutputDelta(NamedTuple):
    """New output of one sample.

    Attributes:
        sample_index: Which sample.
        text: New text; may be empty while a character or a stop string is incomplete.
        token_ids: New tokens.
        logprobs: One for each token, where asked for.
        prompt_logprobs: With the first delta of sample 0, where asked for.
    """

    sample_index: int
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleEnd:
    """The end of one sample.

    Attributes:
        sample_index: Which sample.
        finish_reason: STOP or LENGTH; any other end is an error of the whole request.
        stop: The stop string that ended it, or empty.
        completion: What it cost.
    """

    sample_index: int
    finish_reason: FinishReason
    stop: str = ""
    completion: Completion


Output = Header | RatesLeft | OutputDelta | SampleEnd
