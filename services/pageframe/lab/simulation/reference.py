"""What a request must give, whatever happens to it: the sim runner's tokens by plain arithmetic.

The runner reads a history back through block tables, in arrays; here it is a list, and the same
formula in Python's integers (``executor.model.sim_arena`` has it). There is no memory to be wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pageframe.core.step import FinishReason

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_POSITION_FACTOR = 0xD6E8FEB86659FD93


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModel:
    """The simulated model.

    Attributes:
        vocab_size: Number of token ids.
        eos_token_id: The token that ends a sequence.
        eos_probability: How likely each token is that one.
    """

    vocab_size: int
    eos_token_id: int
    eos_probability: float

    def output(
        self,
        prompt_token_ids: Sequence[int],
        *,
        seed: int | None,
        sample_index: int,
        max_tokens: int,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
    ) -> tuple[list[int], FinishReason]:
        """All tokens of a sample, and why it ends; ``seed`` None is temperature 0."""
        key = 0 if seed is None else _mix((_mix(seed) + sample_index + 1) & _MASK)
        stops = set(stop_token_ids) | (set() if ignore_eos else {self.eos_token_id})
        history, power, position = 0, 1, 0
        for token_id in prompt_token_ids:
            history += (token_id + 1) * power
            power = power * _POSITION_FACTOR & _MASK
            position += 1
        output: list[int] = []
        while len(output) < max_tokens:
            drawn = _mix((history + key + position) & _MASK)
            token_id = self._pick(drawn)
            if len(output) < min_tokens:
                while token_id in stops:
                    token_id = (token_id + 1) % self.vocab_size
            output.append(token_id)
            if token_id in stops and len(output) > min_tokens:
                return output, FinishReason.STOP
            history += (token_id + 1) * power
            power = power * _POSITION_FACTOR & _MASK
            position += 1
        return output, FinishReason.LENGTH

    def _pick(self, drawn: int) -> int:
        if (drawn & 0xFFFFFFFF) < round(self.eos_probability * 2**32):
            return self.eos_token_id
        place = (drawn >> 32) * (self.vocab_size - 1) >> 32
        return place if place < self.eos_token_id else place + 1


def _mix(word: int) -> int:
    """SplitMix64's output function."""
    mixed = (word + _GOLDEN) & _MASK
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
    return mixed ^ (mixed >> 31)
