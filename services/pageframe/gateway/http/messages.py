"""Messages and tools of a chat, from OpenAI's form to what chat templates expect."""

import json
import re

from pageframe.core.errors import InvalidRequestError
from pageframe.core.limits import LIMITS
from pageframe.gateway.chat import ChatMessage, Tool
from pageframe.gateway.http.fields import Fields, checked_text, malformed, unimplemented

# What replies carry beside their text; callers send it back with the next turn.
_IGNORED_IN_MESSAGE = ("refusal", "annotations", "reasoning_content")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def read_messages(fields: Fields) -> list[ChatMessage]:
    """Read ``messages``.

    Raises:
        InvalidRequestError: reason FIELD_MALFORMED or UNKNOWN_FIELD.
        UnimplementedError: reason UNIMPLEMENTED_FEATURE, for anything but text.
    """
    return fields.items("messages", _read_message)


def read_tools(fields: Fields) -> tuple[Tool, ...]:
    """Read ``tools`` and ``tool_choice``: the tools that the model is told of.

    Raises:
        InvalidRequestError: reason FIELD_MALFORMED, UNKNOWN_FIELD, TOO_MANY_TOOLS or
            TOOL_CHOICE_WITHOUT_TOOLS.
        UnimplementedError: reason UNIMPLEMENTED_FEATURE, for what only a grammar could ensure.
    """
    tools = tuple(fields.items("tools", _read_tool))
    choice = fields.take("tool_choice")
    if len(tools) > LIMITS.num_tools_max:
        raise InvalidRequestError(
            "TOO_MANY_TOOLS",
            f"there are {len(tools)} tools; at most {LIMITS.num_tools_max} are allowed",
            field="tools",
            num_tools=len(tools),
            num_tools_max=LIMITS.num_tools_max,
        )
    if choice is None or choice == "auto":
        return tools
    if choice == "none":
        return ()
    if not tools:
        raise InvalidRequestError(
            "TOOL_CHOICE_WITHOUT_TOOLS",
            "tool_choice asks for a call, and there are no tools",
            field="tool_choice",
        )
    if choice == "required" or isinstance(choice, dict):
        raise unimplemented("tool_choice", "a call cannot be forced; choose auto or none")
    raise malformed("tool_choice", choice, "none, auto, required or an object")


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


def _read_tool(value: object, path: str) -> Tool:
    fields = Fields.of(value, path)
    kind = fields.text("type", "function")
    if kind != "function":
        raise unimplemented(f"{path}.type {kind[:40]!r}", "only functions are")
    function = fields.inner("function")
    fields.end()
    name = function.text("name")
    if not _TOOL_NAME.fullmatch(name):
        raise malformed(function.path("name"), name, "1 to 64 letters, digits, dots, dashes or _")
    described: dict[str, object] = {"name": name, "description": function.text("description")}
    parameters = function.take("parameters")
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise malformed(function.path("parameters"), parameters, "an object")
        described["parameters"] = parameters
    function.refuse("strict", "arguments cannot be forced into a schema", allowed=(False,))
    function.end()
    return {"type": "function", "function": described}
