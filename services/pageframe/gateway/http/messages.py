"""Messages of a chat, from OpenAI's form to what chat templates expect."""

import json

from pageframe.gateway.chat import ChatMessage, Tool
from pageframe.gateway.http.fields import Fields, checked_text, malformed, unimplemented

# What replies carry beside their text; callers send it back with the next turn.
_IGNORED_IN_MESSAGE = ("refusal", "annotations", "reasoning_content")


def read_messages(fields: Fields) -> list[ChatMessage]:
    """Read ``messages``.

    Raises:
        InvalidRequestError: reason FIELD_MALFORMED or UNKNOWN_FIELD.
        UnimplementedError: reason UNIMPLEMENTED_FEATURE, for anything but text.
    """
    return fields.items("messages", _read_message)


def _read_message(value: object, path: str) -> ChatMessage:
    fields = Fields.of(value, path)
    role = fields.text("role")
    if not role:
        raise malformed(fields.path("role"), None, "a text")
    fields.ignore(_IGNORED_IN_MESSAGE)
    fields.refuse("audio", "there is no sound")
    fields.refuse("function_call", "it was replaced by tool_calls")
    message = ChatMessage(
        # The newer name of the same role; templates know the older one.
        role="system" if role == "developer" else role,
        content=_read_content(fields),
        name=fields.text("name"),
        tool_call_id=fields.text("tool_call_id"),
        tool_calls=tuple(fields.items("tool_calls", _read_call)),
    )
    fields.end()
    return message


def _read_content(fields: Fields) -> str:
    """A text, or a list of parts that all are."""
    path = fields.path("content")
    value = fields.take("content")
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise malformed(path, value, "a text or a list of parts")
    return "\n".join(_read_part(part, f"{path}[{index}]") for index, part in enumerate(value))


def _read_part(value: object, path: str) -> str:
    part = Fields.of(value, path)
    kind = part.text("type")
    if kind not in ("text", "refusal"):
        raise unimplemented(f"{path}.type {kind[:40]!r}", "only text is")
    return checked_text(part.take(kind), part.path(kind))


def _read_call(value: object, path: str) -> Tool:
    """A call that the model made in an earlier turn. Templates want its arguments as an object."""
    fields = Fields.of(value, path)
    function = fields.inner("function")
    name, text = function.text("name"), function.text("arguments", "{}")
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise malformed(function.path("arguments"), text, "a JSON object as text")
    return {
        "id": fields.text("id"),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
