"""What an output has to be, in OpenAI's words and in vLLM's, made into a ``Grammar``.

response_format      {"type": "json_object"}, {"type": "json_schema", "json_schema": {…}}
structured_outputs   {"json": …}, {"regex": …}, {"choice": […]}, {"json_object": true}
guided_json, guided_regex, guided_choice      the same, each a field of its own
"""

import json
import re
from collections.abc import Callable

from pageframe.core.errors import InvalidRequestError
from pageframe.core.grammar import Grammar, GrammarForm
from pageframe.gateway.http.fields import Fields, checked_text, malformed

_ANY_OBJECT = Grammar(GrammarForm.JSON_SCHEMA, '{"type":"object"}')
# What means something in an expression, and itself behind a backslash.
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$]")


def read_grammar(fields: Fields) -> Grammar | None:
    """Read the fields that say what the output has to be; None for any text.

    Raises:
        InvalidRequestError: FIELD_MALFORMED, UNKNOWN_FIELD, or GRAMMAR_GIVEN_TWICE.
        UnimplementedError: reason UNIMPLEMENTED_FEATURE, for a grammar in another form.
    """
    given = {"response_format": _read_response_format(fields)}
    inner = fields.inner("structured_outputs")
    for source, prefix in ((inner, ""), (fields, "guided_")):
        for name, read in _READERS.items():
            value = source.take(prefix + name)
            path = source.path(prefix + name)
            given[path] = None if value is None else read(value, path)
        source.refuse(prefix + "grammar", "give a JSON Schema or a regular expression")
    inner.refuse("structural_tag", "give a JSON Schema or a regular expression")
    inner.end()
    grammars = {path: grammar for path, grammar in given.items() if grammar is not None}
    if len(grammars) > 1:
        raise InvalidRequestError(
            "GRAMMAR_GIVEN_TWICE",
            f"there are {len(grammars)} grammars ({', '.join(grammars)}); give one",
            field=list(grammars)[1],
            num_grammars=len(grammars),
        )
    return next(iter(grammars.values()), None)


def _read_response_format(fields: Fields) -> Grammar | None:
    value = fields.take("response_format")
    if value is None:
        return None
    form = Fields.of(value, fields.path("response_format"))
    kind = form.text("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise malformed(form.path("type"), kind, "text, json_object or json_schema")
    grammar = None
    if kind == "json_schema":
        grammar = _read_described_schema(form.inner("json_schema"))
    elif kind == "json_object":
        grammar = _ANY_OBJECT
    form.end()
    return grammar


def _read_described_schema(fields: Fields) -> Grammar:
    """``strict`` refuses a schema with keywords that cannot be held to; else they are passed over.

    The parts of a schema that can be held to always are, as vLLM has it.
    """
    fields.ignore(("name", "description"))
    is_strict = fields.flag("strict")
    path = fields.path("schema")
    schema = fields.take("schema")
    fields.end()
    if not isinstance(schema, dict):
        raise malformed(path, schema, "an object")
    if not is_strict:
        schema = {"x-guidance": {"lenient": True}} | schema
    return _schema(schema, path)


def _schema(value: object, path: str) -> Grammar:
    """A schema as an object, or as text that is one."""
    if isinstance(value, str):
        return Grammar(GrammarForm.JSON_SCHEMA, value)
    if not isinstance(value, dict):
        raise malformed(path, value, "an object")
    return Grammar(GrammarForm.JSON_SCHEMA, json.dumps(value))


def _regex(value: object, path: str) -> Grammar:
    return Grammar(GrammarForm.REGEX, checked_text(value, path))


def _choice(value: object, path: str) -> Grammar:
    """One of some texts."""
    if not isinstance(value, list) or not value:
        raise malformed(path, value, "a list of texts, at least one")
    texts = [checked_text(text, f"{path}[{index}]") for index, text in enumerate(value)]
    escaped = (_SPECIAL.sub(r"\\\g<0>", text) for text in texts)
    return Grammar(GrammarForm.REGEX, f"({'|'.join(escaped)})")


def _object(value: object, path: str) -> Grammar | None:
    if not isinstance(value, bool):
        raise malformed(path, value, "true or false")
    return _ANY_OBJECT if value else None


_READERS: dict[str, Callable[[object, str], Grammar | None]] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "json_object": _object,
}
