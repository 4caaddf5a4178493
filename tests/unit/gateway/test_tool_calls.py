"""Calls are found in an output however it is cut."""

import json
import random

import pytest

from pageframe.gateway.http.tool_calls import ToolCall, ToolCallParser

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
