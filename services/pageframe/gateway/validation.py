"""Refusals: every malformed or impossible request gets a typed error with the numbers.

Cheap checks come first, so that a request with a million stop strings, or eight megabytes of text,
is answered before anything is done with them.
"""

import dataclasses
import secrets
from collections.abc import Sequence

from pageframe.core.errors import (
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OutOfRangeError,
)
from pageframe.core.limits import LIMITS
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Delivery
from pageframe.core.sampling import SamplingParams, check_token_id
from pageframe.gateway.ranking import check_ranking
from pageframe.gateway.request import GenerateInput


def check_input(request: GenerateInput, facts: ReplicaFacts, now_ns: int) -> None:
    """Check all that can be checked without tokenising, against what the replica serves.

    Raises:
        PageframeError: InvalidRequestError for malformed fields, NotFoundError for the model,
            DeadlineError for a deadline that has passed.
    """
    find_model(request.model, (facts,))
    if request.delivery not in set(Delivery):
        raise _invalid("DELIVERY_UNKNOWN", "delivery is unknown", request.delivery)
    _check_name("request_id", request.request_id, LIMITS.request_id_bytes_max)
    _check_name("session_id", request.session_id, LIMITS.session_id_bytes_max)
    _check_name("prefix_handle", request.prefix_handle, LIMITS.prefix_handle_bytes_max)
    _check_prompt(request, facts)
    _check_samples(request)
    check_stops(request.stop)
    _check_resume(request, facts)
    if not -(2**31) <= request.priority < 2**31:
        raise _invalid("PRIORITY_OUT_OF_RANGE", "priority must fit into 32 bits", request.priority)
    max_tokens = facts.max_model_len if request.max_tokens is None else request.max_tokens
    sampling = _sampling_with(request, request.seed or 0, max_tokens)
    sampling.validate(facts.vocab_size)
    check_ranking(request, sampling, facts)
    if request.deadline_ns and request.deadline_ns <= now_ns:
        late_ms = (now_ns - request.deadline_ns) // 1_000_000
        raise DeadlineError(
            "DEADLINE_PASSED", f"the deadline passed {late_ms} ms ago", late_ms=late_ms
        )


def find_model(model: str, served: Sequence[ReplicaFacts]) -> ReplicaFacts:
    """What serves a model; an empty name stands for the first of those that are served.

    Raises:
        NotFoundError: reason UNKNOWN_MODEL.
    """
    for facts in served:
        if model in ("", facts.model):
            return facts
    names = ", ".join(repr(facts.model) for facts in served)
    raise NotFoundError(
        "UNKNOWN_MODEL",
        f"model {model[:200]!r} is not served here; {names} {'is' if len(served) == 1 else 'are'}",
        model=model[:200],
        served=", ".join(facts.model for facts in served),
    )


def check_prompt_length(num_prompt_tokens: int, facts: ReplicaFacts) -> None:
    """Refuse a prompt that is empty, or leaves no room for one token of output.

    Raises:
        InvalidRequestError: reason EMPTY_PROMPT.
        OutOfRangeError: reason CONTEXT_TOO_LONG or EXCEEDS_POOL.
    """
    if num_prompt_tokens < 1:
        raise InvalidRequestError("EMPTY_PROMPT", "the prompt has no tokens", num_prompt_tokens=0)
    _check_room(num_prompt_tokens, 1, facts)


def resolve_sampling(
    request: GenerateInput, num_prompt_tokens: int, facts: ReplicaFacts
) -> SamplingParams:
    """Sampling parameters without an open field: a seed picked, ``max_tokens`` set.

    ``max_tokens`` left open becomes what the model's length and the pool leave behind the prompt.

    Raises:
        InvalidRequestError: reason SAMPLING_PARAMETER_OUT_OF_RANGE or EMPTY_PROMPT.
        OutOfRangeError: reason CONTEXT_TOO_LONG or EXCEEDS_POOL.
    """
    check_prompt_length(num_prompt_tokens, facts)
    room = min(facts.max_model_len, _num_tokens_fitting(request, num_prompt_tokens, facts))
    room -= num_prompt_tokens
    max_tokens = max(1, room) if request.max_tokens is None else request.max_tokens
    _check_room(num_prompt_tokens, max_tokens, facts)
    seed = secrets.randbits(64) if request.seed is None else request.seed
    sampling = _sampling_with(request, seed, max_tokens)
    sampling.validate(facts.vocab_size)
    return sampling


def pool_num_tokens(facts: ReplicaFacts) -> int:
    """How many tokens of one sequence the whole block pool can hold."""
    return facts.num_tokens_fitting(facts.num_blocks)


def _num_tokens_fitting(request: GenerateInput, num_prompt_tokens: int, facts: ReplicaFacts) -> int:
    """Tokens of one output for which there is room, were the pool empty.

    The beams of a search may come to share no more than the full blocks of their prompt.
    """
    if request.beams is None:
        return pool_num_tokens(facts)
    num_blocks = facts.num_blocks // facts.num_kv_groups
    num_shared = num_prompt_tokens // facts.block_size
    num_own = (num_blocks - num_shared) // request.beams.num_beams
    return (num_shared + num_own) * facts.block_size


def check_stops(stops: Sequence[str]) -> None:
    """Refuse too many stop strings, before anything is done with them, and empty or long ones.

    Raises:
        InvalidRequestError: reason TOO_MANY_STOP_STRINGS or STOP_STRING_LENGTH_OUT_OF_RANGE.
    """
    if len(stops) > LIMITS.num_stop_strings_max:
        raise InvalidRequestError(
            "TOO_MANY_STOP_STRINGS",
            f"there are {len(stops)} stop strings; at most {LIMITS.num_stop_strings_max} "
            "are allowed",
            num_stop_strings=len(stops),
            num_stop_strings_max=LIMITS.num_stop_strings_max,
        )
    for index, stop in enumerate(stops):
        num_bytes = len(stop.encode("utf-8"))
        if not 1 <= num_bytes <= LIMITS.stop_string_bytes_max:
            raise InvalidRequestError(
                "STOP_STRING_LENGTH_OUT_OF_RANGE",
                f"stop string {index} has {num_bytes} bytes; it must have 1 to "
                f"{LIMITS.stop_string_bytes_max}",
                index=index,
                num_bytes=num_bytes,
                num_bytes_max=LIMITS.stop_string_bytes_max,
            )


def _check_room(num_prompt_tokens: int, max_tokens: int, facts: ReplicaFacts) -> None:
    """Refuse what could not even run alone. The last token is never written to the pool."""
    num_tokens = num_prompt_tokens + max_tokens
    if num_tokens > facts.max_model_len:
        raise OutOfRangeError(
            "CONTEXT_TOO_LONG",
            f"prompt of {num_prompt_tokens} tokens and output of {max_tokens} exceed the model's "
            f"length of {facts.max_model_len}",
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=max_tokens,
            max_model_len=facts.max_model_len,
        )
    if num_tokens - 1 > pool_num_tokens(facts):
        raise OutOfRangeError(
            "EXCEEDS_POOL",
            f"prompt of {num_prompt_tokens} tokens and output of {max_tokens} exceed the whole "
            f"pool of {pool_num_tokens(facts)} tokens",
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=max_tokens,
            pool_num_tokens=pool_num_tokens(facts),
            num_blocks=facts.num_blocks,
            block_size=facts.block_size,
        )


def _sampling_with(request: GenerateInput, seed: int, max_tokens: int) -> SamplingParams:
    return dataclasses.replace(request.sampling, seed=seed, max_tokens=max_tokens)


def _check_name(field_name: str, name: str, num_bytes_max: int) -> None:
    num_bytes = len(name.encode("utf-8"))
    if num_bytes > num_bytes_max:
        raise InvalidRequestError(
            f"{field_name.upper()}_TOO_LONG",
            f"{field_name} has {num_bytes} bytes; at most {num_bytes_max} are allowed",
            num_bytes=num_bytes,
            num_bytes_max=num_bytes_max,
        )


def _check_prompt(request: GenerateInput, facts: ReplicaFacts) -> None:
    given = [
        name for name in ("text", "messages", "token_ids") if getattr(request, name) is not None
    ]
    if not given:
        raise InvalidRequestError(
            "EMPTY_PROMPT", "there is no prompt: give text, a chat or token ids", num_inputs=0
        )
    if len(given) > 1:
        raise InvalidRequestError(
            "SEVERAL_PROMPTS",
            f"there are {len(given)} prompts ({', '.join(given)}); give one",
            num_inputs=len(given),
        )
    prompt: Sequence[object] = getattr(request, given[0])
    if not prompt:
        raise InvalidRequestError("EMPTY_PROMPT", f"{given[0]} is empty", num_prompt_tokens=0)
    if given[0] == "messages" and len(prompt) > LIMITS.num_chat_messages_max:
        raise InvalidRequestError(
            "TOO_MANY_MESSAGES",
            f"the chat has {len(prompt)} messages; at most {LIMITS.num_chat_messages_max} "
            "are allowed",
            num_messages=len(prompt),
            num_messages_max=LIMITS.num_chat_messages_max,
        )
    if request.token_ids is not None:
        check_prompt_length(len(request.token_ids), facts)
        check_token_ids("token_ids", request.token_ids, facts.vocab_size)


def check_token_ids(field_name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Refuse token ids outside ``[0, vocab_size)``; quick for long lists.

    Raises:
        InvalidRequestError: reason TOKEN_ID_OUT_OF_RANGE, naming the first such id.
    """
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        for token_id in token_ids:
            check_token_id(field_name, token_id, vocab_size)


def _check_samples(request: GenerateInput) -> None:
    if not 1 <= request.num_samples <= LIMITS.num_samples_max:
        raise InvalidRequestError(
            "NUM_SAMPLES_OUT_OF_RANGE",
            f"n is {request.num_samples}; it must lie in [1, {LIMITS.num_samples_max}]",
            num_samples=request.num_samples,
            minimum=1,
            maximum=LIMITS.num_samples_max,
        )


def _check_resume(request: GenerateInput, facts: ReplicaFacts) -> None:
    outputs = request.resume_token_ids
    if not outputs:
        return
    if len(outputs) != request.num_samples:
        raise InvalidRequestError(
            "RESUME_MISMATCH",
            f"output of {len(outputs)} samples is given; the request has {request.num_samples}",
            num_resumed=len(outputs),
            num_samples=request.num_samples,
        )
    for token_ids in outputs:
        check_token_ids("resume_token_ids", token_ids, facts.vocab_size)
    if request.seed is None and not request.sampling.is_greedy:
        raise InvalidRequestError(
            "RESUME_NEEDS_SEED", "a resumed generation needs the seed that the broken stream told"
        )
    num_resumed = max(map(len, outputs))
    if request.max_tokens is not None and num_resumed > request.max_tokens:
        raise InvalidRequestError(
            "RESUME_TOO_LONG",
            f"{num_resumed} tokens to resume from are more than max_tokens {request.max_tokens}",
            num_resume_tokens=num_resumed,
            max_tokens=request.max_tokens,
        )


def _invalid(reason: str, message: str, value: object) -> InvalidRequestError:
    return InvalidRequestError(reason, f"{message}; it is {value}", value=value)
