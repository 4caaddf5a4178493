"""Sampling parameters and log-probabilities, between domain types and protobuf."""

from collections.abc import Iterable, Sequence

from pageframe.core.errors import InvalidRequestError
from pageframe.core.grammar import Grammar, GrammarForm
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import TokenLogprobs
from pageframe.v1 import sequence_pb2


def sampling_to_proto(sampling: SamplingParams) -> sequence_pb2.SamplingParameters:
    """Spell out every field; inside the system nothing is left to a default."""
    message = sequence_pb2.SamplingParameters(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        logit_bias=dict(sampling.logit_bias),
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
        max_tokens=sampling.max_tokens,
    )
    if sampling.num_logprobs >= 0:
        message.num_logprobs = sampling.num_logprobs
    if sampling.num_prompt_logprobs >= 0:
        message.num_prompt_logprobs = sampling.num_prompt_logprobs
    if sampling.grammar is not None:
        message.grammar.CopyFrom(grammar_to_proto(sampling.grammar))
    return message


def sampling_from_proto(
    message: sequence_pb2.SamplingParameters, *, seed: int, max_tokens: int
) -> SamplingParams:
    """Read parameters; ``seed`` and ``max_tokens`` stand in where the message has none.

    Ranges are not checked here: see ``SamplingParams.validate``.

    Raises:
        InvalidRequestError: reason GRAMMAR_FORM_MISSING, for a grammar in no form.
    """
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=(
            message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
        ),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed if message.HasField("seed") else seed,
        logit_bias=dict(message.logit_bias),
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else -1,
        num_prompt_logprobs=(
            message.num_prompt_logprobs if message.HasField("num_prompt_logprobs") else -1
        ),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else max_tokens,
        grammar=_grammar_from_proto(message.grammar) if message.HasField("grammar") else None,
    )


def grammar_to_proto(grammar: Grammar) -> sequence_pb2.Grammar:
    """Convert a grammar.

    Raises:
        ValueError: its text is no Unicode.
    """
    match grammar.form:
        case GrammarForm.JSON_SCHEMA:
            return sequence_pb2.Grammar(json_schema=grammar.text)
        case GrammarForm.REGEX:
            return sequence_pb2.Grammar(regex=grammar.text)
        case GrammarForm.LARK:
            return sequence_pb2.Grammar(lark=grammar.text)


def _grammar_from_proto(message: sequence_pb2.Grammar) -> Grammar:
    form = message.WhichOneof("form")
    if form is None:
        raise InvalidRequestError(
            "GRAMMAR_FORM_MISSING", "grammar is no json_schema, no regex and no lark; give one"
        )
    return Grammar(GrammarForm(form), getattr(message, form))


def logprobs_to_proto(logprobs: TokenLogprobs) -> sequence_pb2.TokenLogprobs:
    """Convert the figures of one token."""
    return sequence_pb2.TokenLogprobs(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
    )


def logprobs_from_proto(message: sequence_pb2.TokenLogprobs) -> TokenLogprobs:
    """Convert the figures of one token."""
    return TokenLogprobs(
        token_id=message.token_id,
        logprob=message.logprob,
        top_token_ids=list(message.top_token_ids),
        top_logprobs=list(message.top_logprobs),
    )


def logprobs_list_to_proto(logprobs: Sequence[TokenLogprobs]) -> list[sequence_pb2.TokenLogprobs]:
    """Convert the figures of several tokens."""
    return [logprobs_to_proto(entry) for entry in logprobs]


def logprobs_list_from_proto(
    messages: Iterable[sequence_pb2.TokenLogprobs],
) -> list[TokenLogprobs]:
    """Convert the figures of several tokens."""
    return [logprobs_from_proto(message) for message in messages]
