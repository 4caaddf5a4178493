"""Tool calls in what a model says, in the form that Hermes 2 Pro began and Qwen 2.5 and 3 use.

    I look it up. <tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>
    ───text────── ──────────────────────────call──────────────────────────────

Text arrives in pieces, and a tag may be cut anywhere. What comes out does not depend on the cuts.
White space around a call belongs to neither.

A model that is free may write anything between the tags. So a call is given out when it is
complete, and always is JSON; what is no call stays text. One that a grammar holds writes calls in
this form only, so that their arguments can be given out as they come:

    <tool_call>⏎{"name": "weather", "arguments": {"city": "Köln"}}⏎</tool_call>

Source of the form: NousResearch, Hermes-Function-Calling, "Prompt Format for Function Calling".
"""

import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"

# A call that a grammar holds, but for the name and the arguments. Nothing within the arguments can
# be taken for their end: between parts of JSON there is no such thing, and within its texts a line
# break is written otherwise.
CALL_START, CALL_NAME_END, CALL_END = '\n{"name": "', '", "arguments": ', f"}}\n{CLOSE_TAG}"
_CALL_HEAD = re.compile(f'{re.escape(CALL_START)}([^"]+){re.escape(CALL_NAME_END)}')


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a function, as the model wants it.

    Attributes:
        name: Of the function.
        arguments: A JSON object, as text; where it comes in pieces the first of them.
        call_id: By which the result refers to it.
    """

    name: str
    arguments: str
    call_id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass(frozen=True, slots=True)
class MoreArguments:
    """What follows in the arguments of the last call.

    Attributes:
        text: The next piece.
    """

    text: str


CallPart = ToolCall | MoreArguments
Part = str | CallPart


def join_calls(parts: Iterable[CallPart]) -> list[ToolCall]:
    """Whole calls of one output; the last may be cut off as the output was."""
    calls: list[ToolCall] = []
    for part in parts:
        if isinstance(part, ToolCall):
            calls.append(part)
        else:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + part.text)
    return calls


class ToolCallParser:
    """Splits one output of a model that is free into text and calls."""

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


class HeldCallParser(ToolCallParser):
    """Splits one output that a grammar holds; arguments come in pieces."""

    def __init__(self) -> None:
        super().__init__()
        # Pieces of the arguments of the call that is being told; none before its head is there.
        self._arguments: list[str] | None = None

    def finish(self) -> list[Part]:
        """End the output, wherever it was cut off."""
        if self._arguments is None:
            return super().finish()
        # What may be the beginning of the end belongs to the arguments unless they are complete.
        rest = "".join(self._held)
        is_complete = _object_of("".join(self._arguments)) is not None
        return [] if is_complete or not rest else [MoreArguments(rest)]

    def _feed_inside(self, text: str, parts: list[Part]) -> str:
        text = "".join(self._held) + text
        if self._arguments is None:
            head = _CALL_HEAD.match(text)
            if head is None:
                self._held = [text]
                return ""
            parts.append(ToolCall(name=head[1], arguments=""))
            self._arguments, text = [], text[head.end() :]
        arguments, end, behind = text.partition(CALL_END)
        certain = arguments if end else arguments[: len(arguments) - _num_begun(text, CALL_END)]
        if certain:
            self._arguments.append(certain)
            parts.append(MoreArguments(certain))
        self._held = [arguments[len(certain) :]]
        if end:
            self._held, self._arguments, self._is_inside = [], None, False
            self._is_behind_call = True
        return behind


def parse_call(text: str) -> ToolCall | None:
    """The call that ``text`` is; None if it is none."""
    value = _object_of(text)
    if value is None:
        return None
    name = value.get("name")
    arguments = value.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))


def _object_of(text: str) -> dict[str, object] | None:
    """The JSON object that ``text`` is; None if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _num_begun(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
