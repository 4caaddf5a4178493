"""Tools of chats: what the model is told, what holds its calls, and how they are told."""

import json

import pytest

from pageframe.core.step import FinishReason
from unit.gateway.chat_house import CALL, WEATHER, ask, refusal, with_house
from unit.gateway.http_house import Says
from unit.gateway.tiny_tokenizers import byte_level


def test_tools_are_rendered_and_calls_read_out_of_the_reply(tool_folder):
    async def scenario(house):
        return await ask(house, tools=[WEATHER]), house.prompt()

    reply, prompt = with_house(tool_folder, scenario, Says(f"I look.\n{CALL}\n{CALL}"))
    assert '"name": "weather"' in prompt
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["weather"] * 2
    assert json.loads(calls[0].function.arguments) == {"city": "Rom"}
    assert calls[0].id != calls[1].id


def test_calls_are_streamed_too(tool_folder):
    async def scenario(house):
        stream = await ask(house, tools=[WEATHER], stream=True)
        return [chunk.choices[0] async for chunk in stream]

    choices = with_house(tool_folder, scenario, Says(f"Yes.\n{CALL}\n{CALL}"))
    assert "".join(choice.delta.content or "" for choice in choices) == "Yes."
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert all(json.loads(call.function.arguments) == {"city": "Rom"} for call in calls)
    assert choices[-1].finish_reason == "tool_calls"


def test_earlier_calls_and_their_results_go_into_the_prompt(tool_folder):
    function = {"name": "weather", "arguments": '{"city": "Rom"}'}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]  # fmt: skip

    async def scenario(house):
        await ask(house, messages=messages)
        return house.prompt()

    prompt = with_house(tool_folder, scenario, Says("x"))
    # Jinja's trim_blocks takes the line breaks, as in transformers.
    assert prompt == (
        "[system]Be brief."
        '[assistant]<tool_call>{"name": "weather", "arguments": {"city": "Rom"}}'
        "[tool]sunny(call_1)"
    )


def test_without_parallel_calls_the_first_call_ends_the_output(tool_folder):
    async def scenario(house):
        return await ask(house, tools=[WEATHER], parallel_tool_calls=False)

    (choice,) = with_house(tool_folder, scenario, Says(CALL + CALL, step=400)).choices
    assert choice.finish_reason == "tool_calls"
    assert len(choice.message.tool_calls) == 1


LOOK = f"I look.\n{CALL}"
CLOCK = {"type": "function", "function": {"name": "clock", "strict": True}}


@pytest.mark.parametrize(
    ("tools", "choice", "is_parallel", "starts"),
    [
        ([WEATHER], "required", True, 'call ("\\n" call)*'),
        ([WEATHER], "required", False, "call"),
        ([WEATHER], {"type": "function", "function": {"name": "weather"}}, True, "call"),
        ([WEATHER, CLOCK], "auto", True, "(until_tag body)* TEXT"),
        ([WEATHER, CLOCK], None, False, "until_tag body | TEXT"),
        ([WEATHER, CLOCK], {"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}},
         True, 'call ("\\n" call)*'),
    ],
)  # fmt: skip
def test_a_call_is_forced_and_strict_arguments_are_held_by_a_grammar(
    tool_folder, tools, choice, is_parallel, starts
):
    async def scenario(house):
        options = {} if choice is None else {"tool_choice": choice}
        reply = await ask(house, tools=tools, parallel_tool_calls=is_parallel, **options)
        return reply, house.link.submissions[0].sampling.grammar, house.prompt()

    reply, grammar, prompt = with_house(tool_folder, scenario, Says(CALL))
    assert grammar.text.startswith(f"start: {starts}\n")
    named = choice["allowed_tools"]["tools"] if "allowed" in str(choice) else tools
    for tool in tools:
        name = tool["function"]["name"]
        assert (f'\\"name\\": \\"{name}\\"' in grammar.text) == (name in str(named))
        assert f'"name": "{name}"' in prompt, "the model is told of all"
    (choice,) = reply.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Rom"}


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_arguments_that_are_held_are_streamed_as_they_come(tool_folder, reason):
    async def scenario(house):
        stream = await ask(house, tools=[CLOCK, WEATHER], stream=True)
        return [chunk.choices[0] async for chunk in stream]

    text = f"{LOOK}\n{CALL}"[: None if reason is FinishReason.STOP else -17]
    choices = with_house(tool_folder, scenario, Says(text, reason=reason))
    assert "".join(choice.delta.content or "" for choice in choices) == "I look."
    told = [call for choice in choices for call in choice.delta.tool_calls or []]
    heads = [call for call in told if call.id]
    assert [(call.index, call.type, call.function.name) for call in heads] == [
        (0, "function", "weather"),
        (1, "function", "weather"),
    ]
    arguments = ["", ""]
    for call in told:
        arguments[call.index] += call.function.arguments
    assert len(told) > 6, "in pieces"
    is_whole = reason is FinishReason.STOP
    assert arguments == ['{"city": "Rom"}', '{"city": "Rom"}' if is_whole else '{"city": "Ro']
    assert choices[-1].finish_reason == ("tool_calls" if is_whole else "length")


BAD = {"name": "bad", "strict": True, "parameters": {"properties": {"a": {"type": "strin"}}}}


@pytest.mark.parametrize(
    ("functions", "choice", "code", "param"),
    [
        ([WEATHER["function"], BAD], "auto", "grammar_invalid", "tools[1].function.parameters"),
        ([BAD | {"strict": False}], "required", "grammar_invalid", "tools[0].function.parameters"),
        ([{"name": "f", "parameters": {"type": "array"}}], "required",
         "field_malformed", "tools[0].function.parameters.type"),
        ([{"name": "f", "strict": "yes"}], "auto", "field_malformed", "tools[0].function.strict"),
        ([{"name": "f", "parameters": {"title": "x" * 65_536}}], "required",
         "grammar_size_out_of_range", "tools"),
        ([BAD], {"type": "function", "function": {"name": "g"}},
         "unknown_tool", "tool_choice.function.name"),
        ([BAD], {"type": "custom"}, "unimplemented_feature", "tool_choice.type 'custom'"),
        ([BAD], {"type": "allowed_tools", "allowed_tools": {"mode": "all", "tools": []}},
         "field_malformed", "tool_choice.allowed_tools.mode"),
        ([BAD], {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
         "tool_choice_without_tools", "tool_choice"),
        ([BAD], "any", "field_malformed", "tool_choice"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_held_to_are_named(tool_folder, functions, choice, code, param):
    tools = [{"type": "function", "function": function} for function in functions]

    async def scenario(house):
        return await refusal(house, tools=tools, tool_choice=choice), house.link.submissions

    error, submissions = with_house(tool_folder, scenario)
    assert (error.status_code, error.body["code"], error.body["param"]) == (400, code, param)
    assert submissions == []


def test_a_schema_that_is_not_held_to_is_not_read(tool_folder):
    tools = [{"type": "function", "function": BAD | {"strict": False}}]

    async def scenario(house):
        await ask(house, tools=tools)
        return house.link.submissions[0].sampling.grammar

    assert with_house(tool_folder, scenario, Says("x")) is None


def test_no_tool_is_shown_and_no_call_is_read_when_none_is_wanted(tool_folder):
    async def scenario(house):
        return await ask(house, tools=[WEATHER], tool_choice="none"), house.prompt()

    reply, prompt = with_house(tool_folder, scenario, Says(CALL))
    assert "weather" not in prompt
    assert reply.choices[0].message.content == CALL


def test_tools_are_refused_for_a_template_that_does_not_know_them(tmp_path):
    byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")

    async def scenario(house):
        with_tools = await refusal(house, tools=[WEATHER])
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        calling = {"role": "assistant", "tool_calls": [call]}
        with_calls = await refusal(house, messages=[calling])
        return with_tools.body, with_calls.body

    first, second = with_house(tmp_path, scenario)
    assert (first["reason"], first["param"]) == ("TOOLS_UNSUPPORTED", "tools")
    assert second["reason"] == "TOOLS_UNSUPPORTED"
