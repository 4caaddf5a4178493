"""Calls of tools that a grammar holds, through OpenAI's own client, before real processes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import openai
import pytest

from exactness import embedded
from integration import models
from integration.system import System
from integration.test_openai import HI, client_of

# As Hermes' and Qwen's templates tell of tools, in fewer words.
TEMPLATE = """{% if tools %}Call with <tool_call>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"$ref": "#/$defs/days"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
}
NAME = "weather"
WEATHER = {
    "type": "function",
    "function": {"name": NAME, "strict": True, "parameters": PARAMETERS},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": NAME}}


@pytest.fixture(scope="module")
def client(start: Callable[..., System], tmp_path_factory) -> Iterator[openai.OpenAI]:
    """A tiny random Llama whose template knows tools."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    models.write_llama(folder, max_model_len=2048)
    _change_template(folder / "tokenizer_config.json")
    options = ("--device", "cpu", "--dtype", "fp32", "--num-blocks", "256")
    system = start(folder, *options, runner="native")
    with client_of(system) as client:
        yield client
    system.settle()
    system.stop()


def _change_template(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))


def _check_arguments(arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), PARAMETERS)


@pytest.mark.parametrize("seed", range(4))
def test_a_call_that_is_named_is_made_by_its_schema(client: openai.OpenAI, seed: int) -> None:
    reply = client.chat.completions.create(
        model="", messages=HI, tools=[CLOCK, WEATHER], tool_choice=NAMED, max_tokens=250, seed=seed
    )
    (choice,) = reply.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert call.function.name == NAME
    _check_arguments(call.function.arguments)


def test_a_call_that_is_required_is_one_of_those_that_are_there(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="", messages=HI, tools=[CLOCK, WEATHER], tool_choice="required", n=8, seed=1,
        parallel_tool_calls=False, max_tokens=250,
    )  # fmt: skip
    calls = [choice.message.tool_calls for choice in reply.choices]
    assert [len(made) for made in calls] == [1] * 8
    assert {made[0].function.name for made in calls} == {NAME, "clock"}
    for (call,) in calls:
        if call.function.name == NAME:
            _check_arguments(call.function.arguments)
        else:
            assert json.loads(call.function.arguments) == {}


def test_a_stream_of_the_client_puts_the_call_together(client: openai.OpenAI) -> None:
    fields = {
        "model": "", "messages": HI, "tools": [WEATHER], "tool_choice": NAMED, "max_tokens": 250,
        "seed": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**fields).choices[0].message.tool_calls[0].function
    with client.chat.completions.stream(**fields) as stream:
        pieces = [
            event.arguments_delta
            for event in stream
            if event.type == "tool_calls.function.arguments.delta"
        ]
        final = stream.get_final_completion()
    assert len(pieces) > 3
    assert "".join(pieces) == whole.arguments
    (call,) = final.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == (NAME, whole.arguments)
    assert call.function.parsed_arguments == json.loads(whole.arguments)


def test_a_model_that_may_call_is_free_until_it_does(client: openai.OpenAI) -> None:
    replies = client.chat.completions.create(
        model="", messages=HI, tools=[WEATHER], n=16, seed=5, max_tokens=20
    )
    texts = {choice.message.content for choice in replies.choices}
    assert len(texts) > 8, "nothing is forced"


@pytest.mark.model
def test_the_embedded_model_calls(start: Callable[..., System], tmp_path) -> None:
    """It was never taught to; a grammar holds it, and its own words fill the schema."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in embedded.prepare().iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    parameters = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "in_celsius": {"type": "boolean"},
        },
        "required": ["city", "in_celsius"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": NAME, "parameters": parameters}}
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    system = start(folder, "--device", "cpu", "--num-blocks", "256", runner="native")
    with client_of(system) as client:
        fields = {"model": "", "messages": messages, "temperature": 0, "max_tokens": 200}
        forced = client.chat.completions.create(
            **fields, tools=[tool], tool_choice="required", parallel_tool_calls=False
        )
        (call,) = forced.choices[0].message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), parameters)
        strict = {"type": "function", "function": tool["function"] | {"strict": True}}
        free = client.chat.completions.create(**fields, tools=[strict])
        for call in free.choices[0].message.tool_calls or []:
            jsonschema.validate(json.loads(call.function.arguments), parameters)
    system.settle()
    system.stop()
