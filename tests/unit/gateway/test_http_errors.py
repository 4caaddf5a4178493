"""Every typed error has an HTTP code, and documents name what there is."""

from pathlib import Path

import pytest

from pageframe.core.errors import InvalidRequestError, OutOfRangeError, ResourceExhaustedError
from pageframe.gateway.http import errors
from pageframe.gateway.http.errors import ErrorForm, http_code, retry_headers
from pageframe.gateway.http.generation_fields import IGNORED
from pageframe.rpc.status import ERROR_CLASSES

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "openai.md"


@pytest.mark.parametrize("status", sorted(ERROR_CLASSES))
def test_every_error_has_a_code_of_its_kind(status):
    error = ERROR_CLASSES[status]("REASON", "message")
    code = http_code(error)
    assert 400 <= code < 600
    kind = ErrorForm().body(error)["error"]["type"]
    assert kind.startswith("server") == (code >= 500)


def test_the_document_names_every_code():
    text = DOCUMENT.read_text(encoding="utf-8")
    codes = {*errors._CODE_OF_STATUS.values(), *errors._CODE_OF_REASON.values()}
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| 4")]
    rows += [line.split("|")[1] for line in text.splitlines() if line.startswith("| 5")]
    assert {int(code) for row in rows for code in row.split(",")} == codes


def test_the_document_names_every_field_that_is_ignored():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in IGNORED if f"`{name}`" not in text] == []


def test_a_field_is_named_as_its_endpoint_names_it():
    form = ErrorForm("prompt", {"num_logprobs": "logprobs"})
    own = InvalidRequestError("SAMPLING_PARAMETER_OUT_OF_RANGE", "bad", field="num_logprobs")
    length = OutOfRangeError("CONTEXT_TOO_LONG", "long")
    other = InvalidRequestError("SOMETHING_NEW", "bad")
    params = [form.body(error)["error"]["param"] for error in (own, length, other)]
    assert params == ["logprobs", "prompt", None]
    assert form.body(length)["error"]["code"] == "context_length_exceeded"
    assert form.body(other)["error"]["code"] == "something_new"


def test_only_what_may_pass_is_worth_another_try():
    assert retry_headers(ResourceExhaustedError("QUEUE_FULL", "full")) == {"retry-after": "1"}
    assert retry_headers(InvalidRequestError("N", "bad")) == {}


def test_who_comes_too_often_is_told_its_rates_and_when_to_come_again():
    error = ResourceExhaustedError(
        "RATE_LIMITED",
        "too often",
        retry_after_s="1.250",
        num_requests_per_minute=60,
        num_requests_left=0,
        requests_full_after_s="60.000",
        num_tokens_per_minute=9000,
        num_tokens_left=12,
        tokens_full_after_s="59.920",
    )
    assert retry_headers(error) == {
        "retry-after": "2",
        "retry-after-ms": "1250",
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60.000s",
        "x-ratelimit-limit-tokens": "9000",
        "x-ratelimit-remaining-tokens": "12",
        "x-ratelimit-reset-tokens": "59.920s",
    }
    assert http_code(error) == 429
    assert ErrorForm().body(error)["error"]["code"] == "rate_limit_exceeded"
