"""Chat templates: the model's own Jinja program, run in a sandbox.

A template comes with a model's files and is foreign code, so it runs in Jinja's immutable sandbox,
with the same helpers and the same white-space rules as in transformers: the text must be the same.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pageframe.core.errors import InvalidRequestError, PreconditionError

Tool = Mapping[str, object]
"""A tool, or a call of one, in the form that templates share: ``{"type": "function", …}``."""

# What models of the Hermes form write around a call; see ``http.tool_calls``.
_CALL_TAG = "<tool_call>"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a chat.

    Attributes:
        role: Who speaks: ``system``, ``user``, ``assistant`` or what else the template knows.
        content: What is said.
        name: Of the speaker, or of the tool that answers; may be empty.
        tool_call_id: Which call a tool answers; may be empty.
        tool_calls: Calls that the assistant made; their arguments are objects, not text.
    """

    role: str
    content: str
    name: str = ""
    tool_call_id: str = ""
    tool_calls: Sequence[Tool] = ()

    def for_template(self) -> dict[str, object]:
        """The message as templates expect it: optional parts are missing rather than empty."""
        optional = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": list(self.tool_calls),
        }
        given = {name: value for name, value in optional.items() if value}
        return {"role": self.role, "content": self.content, **given}


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile ``source``; ``special_tokens`` maps names such as ``bos_token`` to their text.

        Raises:
            PreconditionError: reason CHAT_TEMPLATE_MALFORMED, if it is no Jinja template.
        """
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            names = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise PreconditionError(
                "CHAT_TEMPLATE_MALFORMED", f"the model's chat template does not compile: {error}"
            ) from error
        self._knows_tools = "tools" in names and _CALL_TAG in source

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> str:
        """The text of a chat, up to where the assistant begins to speak.

        Raises:
            InvalidRequestError: reason CHAT_TEMPLATE_REFUSED, with the template's own words; for
                example a role that it does not know. TOOLS_UNSUPPORTED for tools that it would
                not tell the model of, or whose calls could not be read out of the reply.
        """
        if not self._knows_tools and (tools or any(item.tool_calls for item in messages)):
            raise InvalidRequestError(
                "TOOLS_UNSUPPORTED",
                "this model's chat template knows no tools, or its calls have another form than "
                f"{_CALL_TAG}",
                num_tools=len(tools),
            )
        try:
            return self._template.render(
                messages=[item.for_template() for item in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except Exception as error:
            # Whatever a foreign program raises (it may divide by zero), it refused these messages.
            raise InvalidRequestError(
                "CHAT_TEMPLATE_REFUSED",
                f"the model's chat template refuses these messages: {error}",
                num_messages=len(messages),
            ) from error


class _Generation(jinja2.ext.Extension):
    """Accepts ``{% generation %}`` blocks, which mark a template's assistant text for training."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a model was never trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(template: str) -> str:
    # Local time, as in transformers.
    return datetime.datetime.now().astimezone().strftime(template)
