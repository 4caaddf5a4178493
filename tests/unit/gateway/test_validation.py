"""Each refusal with its reason and its numbers."""

import dataclasses
import math

import pytest

from pageframe.core.errors import (
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OutOfRangeError,
)
from pageframe.core.sampling import SamplingParams
from pageframe.gateway.chat import ChatMessage
from pageframe.gateway.request import GenerateInput
from pageframe.gateway.validation import check_input, pool_num_tokens, resolve_sampling
from unit.gateway.replicas import make_facts

FACTS = make_facts(max_model_len=100, num_blocks=5, block_size=16, vocab_size=50)
NOW_NS = 10**18


def _refusal(error_class, request, facts=FACTS):
    with pytest.raises(error_class) as caught:
        check_input(request, facts, NOW_NS)
    return caught.value


def _request(**fields):
    return GenerateInput(**({"text": "hi"} | fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": None}, "EMPTY_PROMPT"),
        ({"text": ""}, "EMPTY_PROMPT"),
        ({"text": None, "messages": []}, "EMPTY_PROMPT"),
        ({"text": None, "token_ids": []}, "EMPTY_PROMPT"),
        ({"token_ids": [1]}, "SEVERAL_PROMPTS"),
        ({"text": None, "messages": [ChatMessage("user", "x")] * 4097}, "TOO_MANY_MESSAGES"),
        ({"text": None, "token_ids": [1, 50]}, "TOKEN_ID_OUT_OF_RANGE"),
        ({"text": None, "token_ids": [-1]}, "TOKEN_ID_OUT_OF_RANGE"),
        ({"num_samples": 0}, "NUM_SAMPLES_OUT_OF_RANGE"),
        ({"num_samples": 65}, "NUM_SAMPLES_OUT_OF_RANGE"),
        ({"stop": [""]}, "STOP_STRING_LENGTH_OUT_OF_RANGE"),
        ({"stop": ["é" * 513]}, "STOP_STRING_LENGTH_OUT_OF_RANGE"),
        ({"stop": ["x"] * 65}, "TOO_MANY_STOP_STRINGS"),
        ({"request_id": "é" * 65}, "REQUEST_ID_TOO_LONG"),
        ({"priority": 2**31}, "PRIORITY_OUT_OF_RANGE"),
        ({"resume_token_ids": [[50]], "seed": 1}, "TOKEN_ID_OUT_OF_RANGE"),
        ({"resume_token_ids": [[1]], "seed": 1, "num_samples": 2}, "RESUME_MISMATCH"),
        ({"resume_token_ids": [[1]]}, "RESUME_NEEDS_SEED"),
        ({"resume_token_ids": [[1, 2]], "seed": 1, "max_tokens": 1}, "RESUME_TOO_LONG"),
        ({"max_tokens": 0}, "SAMPLING_PARAMETER_OUT_OF_RANGE"),
        ({"seed": 2**64}, "SAMPLING_PARAMETER_OUT_OF_RANGE"),
        ({"sampling": SamplingParams(temperature=math.nan)}, "SAMPLING_PARAMETER_OUT_OF_RANGE"),
        ({"sampling": SamplingParams(temperature=-0.1)}, "SAMPLING_PARAMETER_OUT_OF_RANGE"),
        ({"sampling": SamplingParams(stop_token_ids=(50,))}, "TOKEN_ID_OUT_OF_RANGE"),
        ({"sampling": SamplingParams(min_tokens=9), "max_tokens": 8},
         "SAMPLING_PARAMETER_OUT_OF_RANGE"),
    ],
)  # fmt: skip
def test_malformed_requests_are_refused(fields, reason):
    assert _refusal(InvalidRequestError, _request(**fields)).reason == reason


def test_a_million_stop_strings_are_refused_unread():
    class Stops(list):
        def __iter__(self):
            raise AssertionError("nobody has to look at a million strings")

    error = _refusal(InvalidRequestError, _request(stop=Stops(["x"] * 1_000_000)))
    assert error.limits == {"num_stop_strings": "1000000", "num_stop_strings_max": "64"}


def test_an_unknown_model_is_not_found():
    error = _refusal(NotFoundError, _request(model="other"))
    assert error.reason == "UNKNOWN_MODEL"
    assert error.limits == {"model": "other", "served": "tiny"}


@pytest.mark.parametrize(
    ("field_name", "num_bytes_max"),
    [("request_id", 128), ("session_id", 256), ("prefix_handle", 256)],
)
def test_names_are_bounded_in_bytes_not_in_characters(field_name, num_bytes_max):
    check_input(_request(**{field_name: "x" * num_bytes_max}), FACTS, NOW_NS)
    error = _refusal(InvalidRequestError, _request(**{field_name: "é" * (num_bytes_max // 2 + 1)}))
    assert error.reason == f"{field_name.upper()}_TOO_LONG"
    assert error.limits["num_bytes"] == str(num_bytes_max + 2)
    assert error.limits["num_bytes_max"] == str(num_bytes_max)


def test_a_deadline_that_has_passed_is_refused():
    error = _refusal(DeadlineError, _request(deadline_ns=NOW_NS - 7_000_000))
    assert (error.reason, error.limits["late_ms"]) == ("DEADLINE_PASSED", "7")


def test_a_sound_request_passes():
    check_input(
        _request(model="tiny", stop=["x"] * 64, num_samples=64, deadline_ns=NOW_NS + 1),
        FACTS,
        NOW_NS,
    )


def test_a_prompt_past_the_context_is_refused():
    facts = make_facts(max_model_len=100, num_blocks=50, block_size=16)
    error = _refusal(OutOfRangeError, _request(text=None, token_ids=[1] * 100), facts)
    assert error.reason == "CONTEXT_TOO_LONG"
    assert error.limits == {"num_prompt_tokens": "100", "max_tokens": "1", "max_model_len": "100"}


def test_output_past_the_context_is_refused():
    facts = make_facts(max_model_len=100, num_blocks=50, block_size=16)
    with pytest.raises(OutOfRangeError) as caught:
        resolve_sampling(_request(max_tokens=41), 60, facts)
    assert caught.value.reason == "CONTEXT_TOO_LONG"
    assert resolve_sampling(_request(max_tokens=40), 60, facts).max_tokens == 40


def test_what_exceeds_the_pool_is_refused_with_its_size():
    """80 tokens fit into the pool; the last one made is never written to it."""
    with pytest.raises(OutOfRangeError) as caught:
        resolve_sampling(_request(max_tokens=22), 60, FACTS)
    assert caught.value.reason == "EXCEEDS_POOL"
    assert caught.value.limits["pool_num_tokens"] == "80"
    assert resolve_sampling(_request(max_tokens=21), 60, FACTS).max_tokens == 21


def test_max_tokens_left_open_is_what_remains():
    assert pool_num_tokens(FACTS) == 80
    assert resolve_sampling(_request(), 60, FACTS).max_tokens == 20
    wide = dataclasses.replace(FACTS, num_blocks=50)
    assert resolve_sampling(_request(), 60, wide).max_tokens == 40


def test_a_pool_whose_layers_are_in_groups_holds_as_many_tokens_fewer():
    # Of five blocks of 16 tokens each group has two.
    assert pool_num_tokens(dataclasses.replace(FACTS, kv_group_windows=(0, 0))) == 32


def test_an_empty_tokenisation_is_refused():
    with pytest.raises(InvalidRequestError) as caught:
        resolve_sampling(_request(), 0, FACTS)
    assert caught.value.reason == "EMPTY_PROMPT"


def test_a_seed_is_picked_when_none_is_given():
    seeds = {resolve_sampling(_request(), 1, FACTS).seed for _ in range(8)}
    assert len(seeds) == 8
    assert resolve_sampling(_request(seed=0), 1, FACTS).seed == 0
