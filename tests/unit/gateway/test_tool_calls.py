"""Calls are found in an output however it is cut."""

import json
import random

import pytest

from pageframe.gateway.http.tool_calls import (
    HeldCallParser,
    ToolCall,
    ToolCallParser,
    join_calls,
)

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def parts_of(pieces):
    """Text put together, calls as (name, arguments)."""
    parser, found = ToolCallParser(), []
    for part in [part for piece in pieces for part in parser.feed(piece)] + parser.finish():
        if isinstance(part, ToolCall):
            found.append((part.name, json.loads(part.arguments)))
        elif found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


WEATHER = ("weather", {"city": "Köln"})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plain < text <tool", ["plain < text <tool"]),
        (f" I look.\n\n{CALL}", [" I look.", WEATHER]),
        (f"{CALL}\n{CALL}\n", [WEATHER, WEATHER]),
        (f"{CALL} then", [WEATHER, "then"]),
        (CALL.removesuffix("</tool_call>"), [WEATHER]),
        ('<tool_call>{"name": "now"}</tool_call>', [("now", {})]),
        ("a <tool_call>not JSON</tool_call> b", ["a <tool_call>not JSON</tool_call> b"]),
        ('<tool_call>{"name": 3}</tool_call>', ['<tool_call>{"name": 3}</tool_call>']),
        ('a <tool_call>{"name": "f", "arg', ['a <tool_call>{"name": "f", "arg']),
        ("  \n ", ["  \n "]),
        ("", []),
    ],
)
def test_calls_and_text_are_told_apart(text, found):
    assert parts_of([text]) == found
    assert parts_of(text) == found, "one character at a time"


def test_no_cut_changes_what_is_found():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    snippets = [CALL, CALL[:-5], "<tool_call>", "</tool_call>", " ", "\n", "<", "text", "{}"]
    for _ in range(300):
        text = "".join(rng.choices(snippets, k=rng.randrange(1, 9)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parts_of(pieces) == parts_of([text]), (text, cuts)


def test_each_call_has_an_id_of_its_own():
    parser = ToolCallParser()
    first, second = parser.feed(CALL + CALL)
    assert first.call_id != second.call_id


def held_parts_of(pieces):
    """Text put together, and calls as (name, arguments as text), of an output that is held."""
    parser, text, calls = HeldCallParser(), "", []
    for part in [part for piece in pieces for part in parser.feed(piece)] + parser.finish():
        if isinstance(part, str):
            text += part
        else:
            calls.append(part)
    return text, [(call.name, call.arguments) for call in join_calls(calls)]


ROME = '{"city": "</tool_call>", "of": {"a": [{}]}}'
HELD = f'<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (HELD, "", [("weather", ROME)]),
        (f"I look.\n{HELD}\n{HELD} So.", "I look.So.", [("weather", ROME)] * 2),
        ("none <tool", "none <tool", []),
        # Cut off by max_tokens: in the tag, in the name, in the arguments, behind them.
        ('a <tool_call>\n{"na', 'a <tool_call>\n{"na', []),
        (HELD[:-30], "", [("weather", ROME[:-16])]),
        (HELD[:-15], "", [("weather", ROME[:-1])]),
        (HELD[:-14], "", [("weather", ROME)]),
        (HELD[:-13], "", [("weather", ROME)]),
        (HELD[:-5], "", [("weather", ROME)]),
    ],
)
def test_arguments_that_are_held_come_as_they_are_said(text, said, calls):
    assert held_parts_of([text]) == (said, calls)
    assert held_parts_of(text) == (said, calls), "one character at a time"


def test_arguments_that_are_held_do_not_wait_for_their_end():
    parser = HeldCallParser()
    parts = [len(parser.feed(character)) for character in HELD]
    assert sum(parts) > len(ROME) - 4
    assert parts[HELD.index("weather") + 30] == 1
