"""The fields that completions and chat completions have in common, made into a ``GenerateInput``.

Fields of OpenAI's that cannot change what is generated here are ignored; those that would, and are
not offered, are refused; all others are refused as unknown.
"""

from dataclasses import dataclass

from pageframe.core.errors import InvalidRequestError
from pageframe.core.request import Delivery
from pageframe.core.sampling import SamplingParams
from pageframe.gateway.http.fields import (
    Fields,
    checked_number,
    checked_text,
    checked_whole,
    malformed,
)
from pageframe.gateway.http.response_format import read_grammar
from pageframe.gateway.request import GenerateInput

IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
)
"""They concern OpenAI's own operation, or are hints that may be passed over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a request came from.

    Attributes:
        tenant: From authentication.
        request_id: The caller's, or made.
        deadline_ns: Absolute, nanoseconds since the Unix epoch; 0 for none.
    """

    tenant: str
    request_id: str
    deadline_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Whether a reply comes in pieces, and how.

    Attributes:
        is_on: It does.
        includes_usage: A last piece tells what was used.
    """

    is_on: bool
    includes_usage: bool


def read_stream(fields: Fields) -> Stream:
    """Read ``stream`` and ``stream_options``.

    Raises:
        InvalidRequestError: FIELD_MALFORMED, UNKNOWN_FIELD, or STREAM_OPTIONS_WITHOUT_STREAM.
    """
    is_on = fields.flag("stream")
    options = fields.take("stream_options")
    if options is None:
        return Stream(is_on=is_on, includes_usage=False)
    if not is_on:
        raise InvalidRequestError(
            "STREAM_OPTIONS_WITHOUT_STREAM",
            "stream_options goes with stream = true only",
            field="stream_options",
        )
    inner = Fields.of(options, "stream_options")
    # Padding against those who guess text from the length of packets; ours goes without.
    inner.ignore(("include_obfuscation",))
    includes_usage = inner.flag("include_usage")
    inner.end()
    return Stream(is_on=True, includes_usage=includes_usage)


def read_generation(fields: Fields, origin: Origin, *, is_stream: bool) -> GenerateInput:
    """Everything but the prompt, the length and what is told beside text.

    Raises:
        InvalidRequestError: reason FIELD_MALFORMED or GRAMMAR_GIVEN_TWICE. Ranges are checked
            later, by ``validation``.
        UnimplementedError: reason UNIMPLEMENTED_FEATURE.
    """
    fields.ignore(IGNORED)
    seed = fields.whole("seed")
    return GenerateInput(
        model=fields.text("model"),
        sampling=_read_sampling(fields),
        # OpenAI's seeds have a sign; ours are the same 64 bits without one.
        seed=seed + 2**64 if seed is not None and -(2**63) <= seed < 0 else seed,
        num_samples=_or(fields.whole("n"), 1),
        stop=_read_stop(fields),
        include_stop=fields.flag("include_stop_str_in_output"),
        delivery=Delivery.EVERY_TOKEN if is_stream else Delivery.FINAL,
        request_id=origin.request_id,
        session_id=fields.text("session_id"),
        prefix_handle=fields.text("prefix_handle"),
        priority=_or(fields.whole("priority"), 0),
        skip_special_tokens=fields.flag("skip_special_tokens", True),
        deadline_ns=origin.deadline_ns,
        tenant=origin.tenant,
    )


def _read_sampling(fields: Fields) -> SamplingParams:
    return SamplingParams(
        temperature=fields.number("temperature", 1.0),
        top_k=max(0, _or(fields.whole("top_k"), 0)),
        top_p=fields.number("top_p", 1.0),
        min_p=fields.number("min_p", 0.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        logit_bias=_read_logit_bias(fields),
        stop_token_ids=tuple(fields.items("stop_token_ids", checked_whole)),
        ignore_eos=fields.flag("ignore_eos"),
        min_tokens=_or(fields.whole("min_tokens"), 0),
        grammar=read_grammar(fields),
    )


def _read_logit_bias(fields: Fields) -> dict[int, float]:
    """Token ids are names of an object, and so they are texts."""
    path = fields.path("logit_bias")
    biases = fields.take("logit_bias")
    if biases is None:
        return {}
    if not isinstance(biases, dict):
        raise malformed(path, biases, "an object")
    bias_of_token = {}
    for name, value in biases.items():
        # Eighteen digits are past every vocabulary, and still a number that is quickly read.
        if not (name.isascii() and name.isdigit() and len(name) <= 18):
            raise malformed(f"a name in {path}", name, "a token id")
        bias_of_token[int(name)] = checked_number(value, f"{path}.{name}")
    return bias_of_token


def _read_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise malformed("stop", value, "a text or a list of texts")
    return tuple(checked_text(entry, f"stop[{index}]") for index, entry in enumerate(value))


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
