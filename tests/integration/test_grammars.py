"""Outputs of a given form, through OpenAI's own client, the command and gRPC."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator

import jsonschema
import openai
import pytest

from integration.system import System
from integration.test_openai import HI, PROMPT, client_of
from pageframe.client import BeamParams, GenerationRequest, Grammar, GrammarForm
from pageframe.core.errors import InvalidRequestError

BOX = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    },
    "required": ["colour", "sizes"],
    "additionalProperties": False,
}
PHONE = r"[0-9]{3}-[0-9]{4}"


@pytest.fixture
def client(llama_system: System) -> Iterator[openai.OpenAI]:
    with client_of(llama_system) as client:
        yield client


def test_a_chat_answers_in_the_form_of_a_schema(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="",
        messages=HI,
        max_tokens=300,
        seed=3,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "box", "schema": BOX, "strict": True},
        },
    )
    assert reply.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(reply.choices[0].message.content), BOX)


def test_a_stream_is_held_to_it_too(client: openai.OpenAI) -> None:
    pieces = client.completions.create(
        model="", prompt=PROMPT, max_tokens=60, seed=5, stream=True,
        extra_body={"guided_regex": PHONE},
    )  # fmt: skip
    assert re.fullmatch(PHONE, "".join(piece.choices[0].text for piece in pieces))


def test_samples_each_choose_for_themselves(client: openai.OpenAI) -> None:
    words = ["the fox", "the dog", "1.5"]
    reply = client.completions.create(
        model="", prompt=PROMPT, n=8, max_tokens=40, seed=1, temperature=5,
        extra_body={"structured_outputs": {"choice": words}},
    )  # fmt: skip
    texts = [choice.text for choice in reply.choices]
    assert set(texts) <= set(words)
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        ({"guided_regex": "(a"}, "grammar_invalid", "unclosed group"),
        ({"guided_json": {"type": "strin"}}, "grammar_invalid", "Invalid type: strin"),
        ({"guided_regex": "a", "ignore_eos": True}, "grammar_with_field", "ignore_eos"),
    ],
)
def test_a_grammar_that_means_nothing_is_refused(client, extra, code, words) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(words)) as caught:
        client.completions.create(model="", prompt=PROMPT, extra_body=extra)
    assert caught.value.code == code


def test_a_beam_search_goes_without(llama_system: System) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llama_system.complete(
            GenerationRequest(
                prompt=PROMPT,
                beam_search=BeamParams(num_beams=2),
                grammar=Grammar(GrammarForm.REGEX, "a"),
            )
        )
    assert caught.value.reason == "GRAMMAR_WITH_FIELD"


def test_output_goes_on_in_its_grammar_where_it_broke_off(llama_system: System) -> None:
    request = {
        "prompt": PROMPT, "seed": 9, "max_tokens": 60, "grammar": Grammar(GrammarForm.REGEX, PHONE),
    }  # fmt: skip
    whole = llama_system.complete(GenerationRequest(**request)).samples[0]
    assert re.fullmatch(PHONE, whole.text)
    for num_known in range(1, len(whole.token_ids)):
        resumed = llama_system.complete(
            GenerationRequest(**request, resume_token_ids=whole.token_ids[:num_known])
        ).samples[0]
        assert resumed.token_ids == whole.token_ids[num_known:]
    elsewhere = llama_system.complete(GenerationRequest(prompt=PROMPT, max_tokens=2, seed=9))
    with pytest.raises(InvalidRequestError) as caught:
        llama_system.complete(
            GenerationRequest(**request, resume_token_ids=elsewhere.samples[0].token_ids)
        )
    assert caught.value.reason == "GRAMMAR_MISMATCH"


def test_the_command_takes_a_schema_and_an_expression(llama_system: System, tmp_path) -> None:
    path = tmp_path / "box.json"
    path.write_text(json.dumps(BOX))
    box = _generate(llama_system, "--json-schema", str(path), "--max-tokens", "300")
    jsonschema.validate(json.loads(box), BOX)
    assert re.fullmatch(PHONE, _generate(llama_system, "--regex", PHONE).strip())


def _generate(system: System, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "pageframe.cli", "generate", PROMPT, *arguments,
         "--server", system.address],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout
