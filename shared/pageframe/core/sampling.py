"""Sampling parameters: what a caller may ask of one step of sampling, and what is refused."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pageframe.core.errors import InvalidRequestError
from pageframe.core.grammar import Grammar
from pageframe.core.limits import LIMITS


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen from logits, and when a sequence ends by itself.

    The defaults sample from the model's own distribution. ``temperature == 0`` is greedy.

    Attributes:
        temperature: Divides the logits, in ``[0, 100]``; 0 takes the best token.
        top_k: Keep the ``top_k`` best tokens; 0 keeps all.
        top_p: Keep the smallest set whose probability reaches ``top_p``, in ``(0, 1]``.
        min_p: Drop tokens below ``min_p`` times the best probability, in ``[0, 1]``.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen in
            prompt or output, in ``(0, 100]`` (Keskar et al. 2019, CTRL); 1 is off.
        presence_penalty: Subtracted once from logits of tokens in the output, in ``[-100, 100]``.
        frequency_penalty: Subtracted per occurrence in the output, in ``[-100, 100]``.
        seed: First word of the random key, in ``[0, 2**64)``; the gateway picks one when the
            caller gives none, and returns it.
        logit_bias: Token id to a number added to its logit, each in ``[-100, 100]``.
        num_logprobs: How many best tokens to report per output token; -1 reports none, 0 only
            the chosen token's own log-probability.
        num_prompt_logprobs: The same for the prompt's tokens; -1 reports none.
        stop_token_ids: Output ends after one of these; it is part of the output ids.
        ignore_eos: Do not end at the model's own end-of-sequence tokens.
        min_tokens: End-of-sequence and stop tokens are impossible before this many.
        max_tokens: Output ends after this many tokens, at least 1.
        grammar: What the output has to be; None for any text. Where it allows no more than an end,
            ``min_tokens`` gives way.
        num_candidates: Report this many best tokens instead of choosing one, for beam search; 0
            chooses one. Inside the system only.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int = -1
    num_prompt_logprobs: int = -1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int = 16
    num_candidates: int = 0
    grammar: Grammar | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken without drawing a random number."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the token history changes the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def validate(self, vocab_size: int) -> None:
        """Check every field; token ids against ``vocab_size`` (number of tokens).

        Raises:
            InvalidRequestError: naming the first field that is out of its range, with the range.
        """
        _check_number("temperature", self.temperature, 0.0, LIMITS.temperature_max)
        _check_number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_number("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_number("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _check_number("top_k", self.top_k, 0, 2**31 - 1)
        _check_number("seed", self.seed, 0, 2**64 - 1)
        _check_number("num_logprobs", self.num_logprobs, -1, LIMITS.num_logprobs_max)
        _check_number("num_prompt_logprobs", self.num_prompt_logprobs, -1, LIMITS.num_logprobs_max)
        _check_number("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_number("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_number("num_candidates", self.num_candidates, 0, vocab_size)
        if self.grammar is not None:
            self._check_grammar(self.grammar)
        _check_count("stop_token_ids", len(self.stop_token_ids), LIMITS.num_stop_token_ids_max)
        _check_count("logit_bias", len(self.logit_bias), LIMITS.num_logit_biases_max)
        for token_id in self.stop_token_ids:
            check_token_id("stop_token_ids", token_id, vocab_size)
        for token_id, bias in self.logit_bias.items():
            check_token_id("logit_bias", token_id, vocab_size)
            _check_number("logit_bias", bias, -100.0, 100.0)

    def _check_grammar(self, grammar: Grammar) -> None:
        grammar.validate()
        # An output that ignores its end, or one of several beams, has no end that a grammar knows.
        for name, is_given in (
            ("ignore_eos", self.ignore_eos),
            ("beam_search", self.num_candidates > 0),
        ):
            if is_given:
                raise InvalidRequestError(
                    "GRAMMAR_WITH_FIELD",
                    f"{name} is given; an output in the form of a {grammar.form.value} goes "
                    "without it",
                    field=name,
                )


def check_token_id(field_name: str, token_id: int, vocab_size: int) -> None:
    """Refuse a token id outside ``[0, vocab_size)``.

    Raises:
        InvalidRequestError: reason TOKEN_ID_OUT_OF_RANGE.
    """
    if not 0 <= token_id < vocab_size:
        raise InvalidRequestError(
            "TOKEN_ID_OUT_OF_RANGE",
            f"{field_name} holds token id {token_id}; the vocabulary has ids 0 to {vocab_size - 1}",
            field=field_name,
            token_id=token_id,
            vocab_size=vocab_size,
        )


def _check_number(
    name: str, value: float, low: float, high: float, *, low_open: bool = False
) -> None:
    below = value <= low if low_open else value < low
    if math.isnan(value) or below or value > high:
        bracket = "(" if low_open else "["
        raise InvalidRequestError(
            "SAMPLING_PARAMETER_OUT_OF_RANGE",
            f"{name} is {value}; it must lie in {bracket}{low}, {high}]",
            field=name,
            value=value,
            minimum=low,
            maximum=high,
        )


def _check_count(name: str, count: int, count_max: int) -> None:
    if count > count_max:
        raise InvalidRequestError(
            "TOO_MANY_ENTRIES",
            f"{name} has {count} entries; at most {count_max} are allowed",
            field=name,
            count=count,
            count_max=count_max,
        )
