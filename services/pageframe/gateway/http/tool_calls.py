"""Tool calls in what a model says, in the form that Hermes 2 Pro began and Qwen 2.5 and 3 use.

    I look it up. <tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>
    ───text────── ──────────────────────────call──────────────────────────────

Text arrives in pieces, and a tag may be cut anywhere. What comes out does not depend on the cuts.
A call is given out when it is complete, so it always is JSON; what stands between the tags and is
no call stays text. White space around a call belongs to neither.

Source of the form: NousResearch, Hermes-Function-Calling, "Prompt Format for Function Calling".
"""

import json
import uuid
from dataclasses import dataclass, field

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a function, as the model wants it.

    Attributes:
        name: Of the function.
        arguments: A JSON object, as text.
        call_id: By which the result refers to it.
    """

    name: str
    arguments: str
    call_id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


Part = str | ToolCall


class ToolCallParser:
    """Splits one output into text and calls."""

    def __init__(self) -> None:
        # Outside a call: what is held back. Inside: everything behind the opening tag, in pieces.
        self._held: list[str] = []
        # White space before the opening tag; it comes back if there is no call behind it.
        self._space = ""
        self._is_inside = False
        self._is_behind_call = False

    def feed(self, text: str) -> list[Part]:
        """Take text; return what has become certain, in order."""
        parts: list[Part] = []
        while text:
            text = self._feed_inside(text, parts) if self._is_inside else self._outside(text, parts)
        return parts

    def finish(self) -> list[Part]:
        """End the output; a call whose closing tag is missing counts if it is complete."""
        rest, self._held = "".join(self._held), []
        if self._is_inside:
            return [parse_call(rest) or self._space + OPEN_TAG + rest]
        return [rest] if rest else []

    def _outside(self, text: str, parts: list[Part]) -> str:
        text = "".join(self._held) + text
        before, tag, behind = text.partition(OPEN_TAG)
        if self._is_behind_call:
            before = before.lstrip()
        if tag:
            certain = before.rstrip()
            self._space = before[len(certain) :]
            self._give(certain, parts)
            self._held, self._is_inside = [], True
            return behind
        certain = before[: len(before) - _num_begun(before, OPEN_TAG)].rstrip()
        self._held = [before[len(certain) :]]
        self._give(certain, parts)
        return ""

    def _feed_inside(self, text: str, parts: list[Part]) -> str:
        # Only the end of what is held can be the beginning of a tag that goes on in the new text.
        tail = "".join(self._held[-len(CLOSE_TAG) :])[-len(CLOSE_TAG) + 1 :]
        self._held.append(text)
        if CLOSE_TAG not in tail + text:
            return ""
        inner, _, behind = "".join(self._held).partition(CLOSE_TAG)
        call = parse_call(inner)
        self._held, self._is_inside = [], False
        if call is None:
            self._give(self._space + OPEN_TAG + inner + CLOSE_TAG, parts)
        else:
            parts.append(call)
            self._is_behind_call = True
        return behind

    def _give(self, text: str, parts: list[Part]) -> None:
        if text:
            parts.append(text)
            self._is_behind_call = False


def parse_call(text: str) -> ToolCall | None:
    """The call that ``text`` is; None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return ToolCall(name=value["name"], arguments=json.dumps(arguments, ensure_ascii=False))


def _num_begun(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
