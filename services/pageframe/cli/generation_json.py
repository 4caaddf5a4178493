"""Generations as JSON: requests from lines, results and errors to objects."""

import dataclasses
import enum
import json
from collections.abc import Mapping
from typing import Any

from pageframe.client import (
    BeamParams,
    EarlyStopping,
    GenerationRequest,
    GenerationResult,
    Grammar,
    GrammarForm,
    Message,
    Sample,
)
from pageframe.core.errors import InvalidRequestError, PageframeError
from pageframe.core.request import Delivery
from pageframe.core.step import TokenLogprobs

# Names that people write for fields that are called otherwise.
_ALIASES = {
    "n": "num_samples",
    "logprobs": "num_logprobs",
    "prompt_logprobs": "num_prompt_logprobs",
}
_INPUTS = ("prompt", "messages", "token_ids")
_FIELDS = {field.name: field for field in dataclasses.fields(GenerationRequest)}
_NUMBERS = frozenset(
    {"temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
)
_COUNTS = frozenset(
    {
        "top_k", "seed", "num_logprobs", "num_prompt_logprobs", "min_tokens", "max_tokens",
        "num_samples", "best_of", "priority",
    }
)  # fmt: skip
_SWITCHES = frozenset({"ignore_eos", "include_stop", "keep_special_tokens"})
_ID_LISTS = frozenset({"token_ids", "stop_token_ids", "resume_token_ids"})


def request_from_line(line: bytes, defaults: GenerationRequest) -> GenerationRequest:
    """Read one line of ``--stdin-jsonl``; what it leaves out is as in ``defaults``.

    Raises:
        InvalidRequestError: MALFORMED_LINE, UNKNOWN_FIELD or MALFORMED_FIELD, naming the field.
    """
    try:
        entries = json.loads(line)
    except ValueError as error:
        # Bytes that are no UTF-8 included.
        raise InvalidRequestError("MALFORMED_LINE", f"the line is no JSON: {error}") from None
    if not isinstance(entries, dict):
        raise InvalidRequestError("MALFORMED_LINE", "the line is no JSON object")
    fields: dict[str, Any] = {
        _ALIASES.get(str(key), str(key)): value for key, value in entries.items()
    }
    for key in fields:
        if key not in _FIELDS:
            raise InvalidRequestError("UNKNOWN_FIELD", f"there is no field {key!r}", field=key)
    values = {key: _field_value(key, value) for key, value in fields.items()}
    if any(values.get(key) is not None for key in _INPUTS):
        # A line's own prompt, of whatever kind, stands in place of the default one.
        no_inputs: dict[str, Any] = dict.fromkeys(_INPUTS)
        values = no_inputs | values
    return dataclasses.replace(defaults, **values)


def result_to_json(result: GenerationResult) -> dict[str, Any]:
    """One object: the first sample's output, usage over all, and what is needed to find the trace.

    With several samples each of them is in ``samples`` too.
    """
    first = result.samples[0]
    started = result.started
    content = sample_to_json(first) | {
        "usage": {
            "prompt_tokens": started.num_prompt_tokens,
            "cached_tokens": first.account.num_cached_tokens,
            "completion_tokens": sum(
                sample.account.num_completion_tokens + sample.account.num_unreturned_tokens
                for sample in result.samples
            ),
        },
        "trace_id": started.trace_id,
        "request_id": started.request_id,
        "model": started.model,
        "seed": started.seed,
    }
    if len(result.samples) > 1:
        content["samples"] = [sample_to_json(sample) for sample in result.samples]
    if result.prompt_logprobs:
        content["prompt_logprobs"] = [_logprobs_to_json(entry) for entry in result.prompt_logprobs]
    return content


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """One sample's output and what it cost; times in milliseconds."""
    account = sample.account
    content: dict[str, Any] = {
        "text": sample.text,
        "token_ids": sample.token_ids,
        "finish_reason": sample.finish_reason.name.lower(),
        "stop": sample.stop or None,
        "account": {
            "num_blocks_peak": account.num_blocks_peak,
            "num_blocks_shared": account.num_blocks_shared,
            "num_copies_on_write": account.num_copies_on_write,
            "num_blocks_saved": account.num_blocks_saved,
            "num_preemptions": account.num_preemptions,
            "num_draft_tokens": account.num_draft_tokens,
            "num_accepted_tokens": account.num_accepted_tokens,
            "elapsed_ms": account.elapsed_ns / 1e6,
            "compute_ms": account.compute_ns / 1e6,
            "stall_ms": {
                cause.name.lower(): waited_ns / 1e6 for cause, waited_ns in account.stall_ns.items()
            },
        },
    }
    if sample.score is not None:
        content["score"] = sample.score
    if sample.logprobs:
        content["logprobs"] = [_logprobs_to_json(entry) for entry in sample.logprobs]
    return content


def error_to_json(error: PageframeError) -> dict[str, Any]:
    """An error with its numbers."""
    return {
        "error": {
            "status": error.status,
            "reason": error.reason,
            "message": error.message,
            "limits": dict(error.limits),
        }
    }


def _logprobs_to_json(entry: TokenLogprobs) -> dict[str, Any]:
    return {
        "token_id": entry.token_id,
        "logprob": entry.logprob,
        "top": [
            {"token_id": token_id, "logprob": logprob}
            for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
        ],
    }


def _field_value(key: str, value: Any) -> Any:
    """A JSON value as the field's type; null leaves the choice to the server where it may.

    Raises:
        InvalidRequestError: MALFORMED_FIELD.
    """
    try:
        return _converted(key, value)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
        raise InvalidRequestError(
            "MALFORMED_FIELD", f"field {key!r} cannot be {json.dumps(value)[:200]}", field=key
        ) from None


def _converted(key: str, value: Any) -> Any:
    default = _FIELDS[key].default
    if value is None and default is None:
        return None
    if key in _NUMBERS:
        return float(_checked(value, int | float))
    if key in _COUNTS:
        return _checked(value, int)
    if key in _SWITCHES:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if key in _ID_LISTS:
        return [_checked(token_id, int) for token_id in _checked(value, list)]
    if key == "resume_outputs":
        return [[_checked(token_id, int) for token_id in _checked(ids, list)] for ids in value]
    if key == "stop":
        entries = [value] if isinstance(value, str) else _checked(value, list)
        return [_checked(entry, str) for entry in entries]
    if key == "messages":
        return [Message(_checked(m["role"], str), _checked(m["content"], str)) for m in value]
    if key == "logit_bias":
        biases = _checked(value, Mapping)
        return {int(token_id): float(bias) for token_id, bias in biases.items()}
    if key == "beam_search":
        return _beam_search(value)
    if key == "grammar":
        return _grammar(value)
    if key == "delivery":
        return _member(Delivery, value)
    return _checked(value, str)


def _beam_search(value: Any) -> BeamParams:
    """``{"num_beams": 4, "num_return": 2, "length_penalty": 1.0, "early_stopping": "never"}``."""
    values = dict(_checked(value, Mapping))
    if "early_stopping" in values:
        values["early_stopping"] = _member(EarlyStopping, values["early_stopping"])
    if "length_penalty" in values:
        values["length_penalty"] = float(_checked(values["length_penalty"], int | float))
    for name in ("num_beams", "num_return"):
        if name in values:
            values[name] = _checked(values[name], int)
    return BeamParams(**values)


def _grammar(value: Any) -> Grammar:
    """``{"regex": "[0-9]+"}``, ``{"json_schema": {"type": "object"}}`` or ``{"lark": "…"}``."""
    ((form, text),) = _checked(value, Mapping).items()
    if form == GrammarForm.JSON_SCHEMA.value and isinstance(text, dict):
        text = json.dumps(text)
    return Grammar(GrammarForm(form), _checked(text, str))


def _checked(value: Any, kind: Any) -> Any:
    # JSON's true is no number, though Python counts it as one.
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError
    return value


def _member(kind: type[enum.IntEnum], name: str) -> enum.IntEnum:
    return kind[name.upper()]
