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
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pageframe.core.errors import InvalidRequestError, PreconditionError


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a chat.

    Attributes:
        role: Who speaks: ``system``, ``user``, ``assistant`` or what else the template knows.
        content: What is said.
    """

    role: str
    content: str


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile ``source``; ``special_tokens`` maps names such as ``bos_token`` to their text.

        Raises:
            PreconditionError: reason CHAT_TEMPLATE_MALFORMED, if it is no Jinja template.
        """
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise PreconditionError(
                "CHAT_TEMPLATE_MALFORMED", f"the model's chat template does not compile: {error}"
            ) from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The text of a chat, up to where the assistant begins to speak.

        Raises:
            InvalidRequestError: reason CHAT_TEMPLATE_REFUSED, with the template's own words; for
                example a role that it does not know.
        """
        try:
            return self._template.render(
                messages=[{"role": item.role, "content": item.content} for item in messages],
                tools=None,
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
