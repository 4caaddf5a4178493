r"""Calls of tools as a grammar: outputs that have to call, or that call by the schema if they do.

Calls are in the one form that Hermes' and Qwen's templates show the models; see ``tool_calls``. A
grammar in llguidance's Lark says it, and each function's parameters stay a document of their own,
so that references within them mean what they meant:

    forced  start: call ("\n" call)*           free  start: (until_tag body)* TEXT
            call: "<tool_call>" body                  until_tag: any text up to the first tag
            body: weather | clock                     TEXT: any text without a tag
            weather: "\n{\"name\": \"weather\", \"arguments\": " %json {…} "}\n</tool_call>"

Free text is one regular expression, so following it costs about ten microseconds a token. Tags are
matched as text: a vocabulary may cut them as it likes, or have tokens for them, but none special.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pageframe.core.grammar import JSON_WHITESPACE, Grammar, GrammarForm
from pageframe.gateway.http.fields import malformed
from pageframe.gateway.http.tool_calls import CALL_END, CALL_NAME_END, CALL_START, OPEN_TAG

# What a function without parameters takes, in OpenAI's words "an empty parameter list".
_NO_PARAMETERS: Mapping[str, object] = {"properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function that may be called.

    Attributes:
        name: Of letters, digits, dots, dashes and ``_`` only.
        parameters: Schema of its arguments; None if it has none.
        is_strict: A schema with keywords that cannot be held to is refused, not passed over.
        path: Where it stands in the request, such as ``tools[0].function``.
    """

    name: str
    parameters: Mapping[str, object] | None
    is_strict: bool
    path: str

    def schema(self) -> str:
        """What its arguments have to be, as JSON: always an object.

        Raises:
            InvalidRequestError: FIELD_MALFORMED; the parameters are no schema of an object.
        """
        parameters = _NO_PARAMETERS if self.parameters is None else self.parameters
        kind = parameters.get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise malformed(f"{self.path}.parameters.type", kind, "object")
        options = {"whitespace_pattern": JSON_WHITESPACE, "lenient": not self.is_strict}
        return json.dumps({**parameters, "type": "object", "x-guidance": options})


def call_grammar(functions: Sequence[Function], *, is_forced: bool, is_parallel: bool) -> Grammar:
    """What an output has to be.

    Args:
        functions: Those that may be called, at least one.
        is_forced: The output is calls; else text in which calls may stand.
        is_parallel: There may be more than one call; else the output ends behind the first.

    Raises:
        InvalidRequestError: FIELD_MALFORMED, as ``Function.schema``.
    """
    bodies = [f"body{index}" for index in range(len(functions))]
    rules = [
        _start(is_forced, is_parallel),
        f"call: {_text(OPEN_TAG)} body",
        f"until_tag[lazy]: /(?s:.*){OPEN_TAG}/",
        f"TEXT: /(?s:.*)/ & ~/(?s:.*){OPEN_TAG}(?s:.*)/",
        f"body: {' | '.join(bodies)}",
        *map(_body_rule, bodies, functions),
    ]
    return Grammar(GrammarForm.LARK, "\n".join(rules))


def argument_grammars(functions: Iterable[Function]) -> dict[str, Grammar]:
    """What the arguments of each function have to be, by the field that says so."""
    return {
        f"{function.path}.parameters": Grammar(GrammarForm.JSON_SCHEMA, function.schema())
        for function in functions
    }


def _start(is_forced: bool, is_parallel: bool) -> str:
    if is_forced:
        return 'start: call ("\\n" call)*' if is_parallel else "start: call"
    return "start: (until_tag body)* TEXT" if is_parallel else "start: until_tag body | TEXT"


def _body_rule(rule: str, function: Function) -> str:
    head = _text(f"{CALL_START}{function.name}{CALL_NAME_END}")
    return f"{rule}: {head} %json {function.schema()} {_text(CALL_END)}"


def _text(text: str) -> str:
    """A literal; Lark's are quoted as JSON's are."""
    return json.dumps(text)
