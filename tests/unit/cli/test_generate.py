"""`pageframe generate` as a process, against a gateway that plays a script."""

import json
import os
import subprocess
import sys

import pytest

from pageframe.cli.generation_json import request_from_line
from pageframe.cli.server_address import find_server
from pageframe.client import (
    DEFAULT_SERVER,
    BeamParams,
    EarlyStopping,
    GenerationRequest,
    Grammar,
    GrammarForm,
    Message,
)
from pageframe.core.errors import InvalidRequestError
from pageframe.core.request import Delivery
from unit.client.played_gateway import delta, end, header, playing

MAIN = "from pageframe.cli.main import main; main()"
SCRIPT = [header(num_prompt_tokens=6), delta("Pa", 3), delta("ris €", 4, 5), end(3)]


def _run(*arguments, address=None, stdin=b""):
    environ = {name: value for name, value in os.environ.items() if name != "PAGEFRAME_SERVER"}
    if address is not None:
        environ["PAGEFRAME_SERVER"] = address
    return subprocess.run(
        [sys.executable, "-c", MAIN, "generate", *arguments],
        input=stdin,
        capture_output=True,
        env=environ,
        timeout=60,
        check=False,
    )


def test_json_has_what_a_machine_needs():
    with playing(SCRIPT) as (gateway, address):
        arguments = ("The capital", "--max-tokens", "3", "--temperature", "0", "--stop", "x")
        arguments += ("--session", "chat-7", "--prefix-handle", "rules")
        result = _run(*arguments, "--json", "--server", address)
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["text"] == "Paris €"
    assert content["token_ids"] == [3, 4, 5]
    assert content["finish_reason"] == "length"
    assert content["usage"] == {"prompt_tokens": 6, "cached_tokens": 0, "completion_tokens": 3}
    assert content["trace_id"] == "ab" * 16
    request = gateway.requests[0]
    assert (request.text, list(request.stop)) == ("The capital", ["x"])
    assert (request.sampling.max_tokens, request.sampling.temperature) == (3, 0.0)
    assert (request.session_id, request.prefix_handle) == ("chat-7", "rules")


def test_without_json_it_is_text():
    with playing(SCRIPT) as (gateway, address):
        result = _run("hi", "--chat", "--system", "be brief", address=address)
    assert result.stdout.decode() == "Paris €\n"
    roles = [message.role for message in gateway.requests[0].chat.messages]
    assert roles == ["system", "user"]


def test_a_failed_request_is_exit_code_1_and_says_why():
    error = InvalidRequestError("EMPTY_PROMPT", "the prompt has no tokens", num_prompt_tokens=0)
    with playing([error]) as (_, address):
        as_text = _run("", address=address)
        as_json = _run("", "--json", address=address)
    assert as_text.returncode == as_json.returncode == 1
    assert as_text.stderr.decode() == "pageframe: EMPTY_PROMPT: the prompt has no tokens\n"
    assert json.loads(as_json.stdout)["error"] == {
        "status": "INVALID_ARGUMENT",
        "reason": "EMPTY_PROMPT",
        "message": "the prompt has no tokens",
        "limits": {"num_prompt_tokens": "0"},
    }


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("hi", "--stdin-jsonl"),
        ("hi", "--system", "x"),
        ("hi", "--top-k", "x"),
        ("hi", "--beams", "2", "--early-stopping", "soon"),
        ("hi", "--regex", "a", "--json-schema", "/dev/null"),
        ("hi", "--json-schema", "/nowhere/at/all"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    assert _run(*arguments).returncode == 2


def test_many_lines_are_answered_in_order():
    lines = [
        b'{"prompt": "a", "max_tokens": 5}',
        b"",
        b'{"token_ids": [1, 2], "n": 1, "temperature": 0.5}',
        b"no json",
        b'{"prompt": "a", "typo": 1}',
        b'{"prompt": "\xff"}',
    ]
    with playing(SCRIPT) as (gateway, address):
        arguments = ("--stdin-jsonl", "--temperature", "0", "--server", address)
        result = _run(*arguments, stdin=b"\n".join(lines))
    assert result.returncode == 1
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3, 4]
    assert [answer.get("error", {}).get("reason") for answer in answers] == [
        None,
        None,
        "MALFORMED_LINE",
        "UNKNOWN_FIELD",
        "MALFORMED_LINE",
    ]
    asked = sorted(gateway.requests, key=lambda request: request.WhichOneof("input"))
    assert [request.sampling.temperature for request in asked] == [0.0, 0.5]
    assert [list(request.token_ids.ids) for request in asked] == [[], [1, 2]]


def test_a_line_lays_its_fields_over_the_defaults():
    defaults = GenerationRequest(prompt="unused", temperature=0.0, max_tokens=9)
    line = json.dumps(
        {
            "messages": [{"role": "user", "content": "hi"}],
            "temperature": None,
            "stop": "x",
            "logit_bias": {"7": -1},
            "delivery": "final",
            "ignore_eos": True,
            "logprobs": 2,
        }
    ).encode()
    assert request_from_line(line, defaults) == GenerationRequest(
        messages=[Message("user", "hi")],
        max_tokens=9,
        stop=["x"],
        logit_bias={7: -1.0},
        delivery=Delivery.FINAL,
        ignore_eos=True,
        num_logprobs=2,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_tokens", "4"),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("temperature", "hot"),
        ("token_ids", [1, "2"]),
        ("token_ids", 5),
        ("resume_outputs", [1]),
        ("resume_outputs", [["1"]]),
        ("stop", [1]),
        ("messages", [{"role": "user"}]),
        ("messages", ["hi"]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", [1]),
        ("delivery", "never"),
        ("ignore_eos", 1),
        ("prompt", 5),
        ("top_k", None),
        ("grammar", "a+"),
        ("grammar", {}),
        ("grammar", {"regex": "a", "json_schema": "{}"}),
        ("grammar", {"regex": {}}),
        ("grammar", {"ebnf": "a"}),
    ],
)
def test_a_field_of_the_wrong_type_is_named(key, value):
    with pytest.raises(InvalidRequestError, match=key) as caught:
        request_from_line(json.dumps({key: value}).encode(), GenerationRequest())
    assert caught.value.reason == "MALFORMED_FIELD"


def test_the_server_is_found_where_it_was_named(tmp_path):
    (tmp_path / "address.json").write_text('{"grpc": "127.0.0.1:7"}')
    assert find_server("a:1", tmp_path, {"PAGEFRAME_SERVER": "b:2"}) == "a:1"
    assert find_server(None, tmp_path, {"PAGEFRAME_SERVER": "b:2"}) == "b:2"
    assert find_server(None, tmp_path, {}) == "127.0.0.1:7"
    assert find_server(None, tmp_path / "absent", {}) == DEFAULT_SERVER
    (tmp_path / "address.json").write_text("[]")
    assert find_server(None, tmp_path, {}) == DEFAULT_SERVER


@pytest.mark.parametrize("form", [("hi",), ("--stdin-jsonl",)])
def test_the_key_in_a_file_is_sent_and_not_shown(form, tmp_path):
    key_file = tmp_path / "key"
    key_file.write_text("secret\n")
    with playing(SCRIPT) as (gateway, address):
        result = _run(
            *form, "--api-key-file", str(key_file), address=address, stdin=b'{"prompt": "hi"}\n'
        )
    assert result.returncode == 0, result.stderr
    assert gateway.metadata[0]["authorization"] == "Bearer secret"
    assert b"secret" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read the API key"), ("two keys", "must hold one key")]
)
def test_a_file_without_one_key_is_refused(content, message, tmp_path):
    key_file = tmp_path / "key"
    if content is not None:
        key_file.write_text(content)
    result = _run("hi", "--api-key-file", str(key_file), address="127.0.0.1:1")
    assert result.returncode == 2
    assert message in result.stderr.decode()


def test_beams_and_their_number_of_outputs_are_sent_and_scores_are_printed():
    script = [header(), delta("a", 3), end(1, score=-0.5), delta("b", 4, sample_index=1)]
    script.append(end(1, sample_index=1, score=-0.75))
    arguments = ("hi", "--beams", "4", "--n", "2", "--length-penalty", "0.5")
    with playing(script, script) as (gateway, address):
        as_json = _run(*arguments, "--early-stopping", "never", "--json", address=address)
        as_text = _run(*arguments, address=address)
    assert [sample["score"] for sample in json.loads(as_json.stdout)["samples"]] == [-0.5, -0.75]
    assert as_text.stdout.decode() == "[0] a\n[1] b\n"
    request = gateway.requests[0]
    search = request.beam_search
    assert (search.num_beams, search.num_return, search.length_penalty) == (4, 2, 0.5)
    assert search.early_stopping == EarlyStopping.NEVER
    assert request.num_samples == 1
    assert not gateway.requests[1].HasField("delivery")


def test_usage_counts_what_is_not_returned():
    script = [header(), delta("a", 3), end(1, score=-0.5, num_unreturned_tokens=7)]
    with playing(script) as (gateway, address):
        result = _run("hi", "--best-of", "3", "--json", address=address)
    assert json.loads(result.stdout)["usage"]["completion_tokens"] == 8
    assert gateway.requests[0].best_of == 3


def test_a_line_may_bring_the_outputs_of_a_broken_stream():
    line = {"prompt": "x", "n": 2, "seed": 1, "resume_outputs": [[3, 4], []]}
    request = request_from_line(json.dumps(line).encode(), GenerationRequest())
    assert request.resume_outputs == [[3, 4], []]


def test_a_line_may_ask_for_a_search():
    line = {"prompt": "x", "beam_search": {"num_beams": 3, "early_stopping": "always"}}
    request = request_from_line(json.dumps(line).encode(), GenerationRequest())
    assert request.beam_search == BeamParams(num_beams=3, early_stopping=EarlyStopping.ALWAYS)
    assert request_from_line(b'{"prompt": "x", "best_of": 2}', GenerationRequest()).best_of == 2


@pytest.mark.parametrize(
    "search", [{}, {"num_beams": "3"}, {"num_beams": 3, "early_stopping": "soon"}, {"beams": 3}, 3]
)
def test_a_search_that_is_none_is_refused(search):
    line = json.dumps({"prompt": "x", "beam_search": search}).encode()
    with pytest.raises(InvalidRequestError) as caught:
        request_from_line(line, GenerationRequest())
    assert caught.value.reason == "MALFORMED_FIELD"


def test_a_schema_and_an_expression_are_sent_as_they_are(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text('{"const": "é"}')
    for arguments, sent in (
        (("--json-schema", str(path)), ("json_schema", '{"const": "é"}')),
        (("--regex", "a|é+"), ("regex", "a|é+")),
    ):
        with playing(SCRIPT) as (gateway, address):
            result = _run("x", *arguments, "--server", address)
        assert result.returncode == 0, result.stderr
        grammar = gateway.requests[0].sampling.grammar
        form = grammar.WhichOneof("form")
        assert (form, getattr(grammar, form)) == sent


def test_a_line_may_say_what_the_output_has_to_be():
    for grammar, wanted in (
        ({"regex": "a+"}, Grammar(GrammarForm.REGEX, "a+")),
        ({"json_schema": {"const": 1}}, Grammar(GrammarForm.JSON_SCHEMA, '{"const": 1}')),
        ({"json_schema": "{}"}, Grammar(GrammarForm.JSON_SCHEMA, "{}")),
    ):
        line = json.dumps({"prompt": "x", "grammar": grammar}).encode()
        assert request_from_line(line, GenerationRequest()).grammar == wanted
