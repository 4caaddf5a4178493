"""What the fields of OpenAI and vLLM say an output has to be."""

import asyncio
import json
import re

import pytest

from pageframe.core.errors import InvalidRequestError, UnimplementedError
from pageframe.core.grammar import GrammarForm
from pageframe.gateway import grammar_checks
from pageframe.gateway.grammar_checks import GrammarChecks
from pageframe.gateway.http.fields import Fields
from pageframe.gateway.http.response_format import read_grammar
from unit.sampling.tiny_vocabulary import regex, schema

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {}}}


def read(body):
    fields = Fields(body)
    grammar = read_grammar(fields)
    fields.end()
    return grammar


def described(**fields):
    return {"response_format": {"type": "json_schema", "json_schema": fields}}


@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}},
    {"structured_outputs": {}}, {"structured_outputs": {"json_object": False}}])  # fmt: skip
def test_any_text_will_do(body):
    assert read(body) is None


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
        {"guided_json_object": True},
    ],
)
def test_any_object_will_do(body):
    assert read(body) == schema('{"type":"object"}')


def test_a_strict_schema_is_taken_as_it_is_with_its_order():
    grammar = read(described(name="person", strict=True, schema=PERSON, description="Who it is."))
    assert grammar == schema(json.dumps(PERSON))
    assert grammar.text.index("name") < grammar.text.index("age")


def test_a_schema_that_is_not_strict_is_held_to_as_far_as_that_goes():
    loose = read(described(name="person", schema={"type": "string", "contains": {}}))
    assert json.loads(loose.text)["x-guidance"] == {"lenient": True}
    asyncio.run(GrammarChecks().check(loose))
    strict = read(described(strict=True, schema={"type": "string", "contains": {}}))
    with pytest.raises(InvalidRequestError, match="contains"):
        asyncio.run(GrammarChecks().check(strict))


@pytest.mark.parametrize("make", [lambda name, value: {f"guided_{name}": value},
    lambda name, value: {"structured_outputs": {name: value}}])  # fmt: skip
def test_vllm_s_words_for_it(make):
    assert read(make("json", PERSON)) == schema(json.dumps(PERSON))
    assert read(make("json", '{"type": "null"}')) == schema('{"type": "null"}')
    assert read(make("regex", "a+")) == regex("a+")
    assert read(make("choice", ["yes", "no"])) == regex("(yes|no)")


@pytest.mark.parametrize(
    "text", ["a.b", "(", "[x]", "a|b", "1+1", "\\d", "^$", "é \n{2}*?", "a-b&~#/"]
)
def test_a_choice_is_of_texts_and_not_of_expressions(text):
    grammar = read({"guided_choice": [text, "other"]})
    assert grammar.form is GrammarForm.REGEX
    assert re.fullmatch(grammar.text, text)
    assert re.fullmatch(grammar.text, "other")
    asyncio.run(GrammarChecks().check(grammar))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (described(schema=True), "response_format.json_schema.schema"),
        (described(schema={}, strict="yes"), "response_format.json_schema.strict"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]"),
        ({"guided_json": []}, "guided_json"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
    ],
)
def test_what_is_malformed_is_refused_by_name(body, field):
    with pytest.raises(InvalidRequestError) as caught:
        read(body)
    assert (caught.value.reason, caught.value.limits["field"]) == ("FIELD_MALFORMED", field)


def test_what_is_not_known_is_refused():
    for body in (
        {"response_format": {"type": "text", "x": 1}},
        described(schema={}, x=1),
        {"structured_outputs": {"x": 1}},
    ):
        with pytest.raises(InvalidRequestError) as caught:
            read(body)
        assert caught.value.reason == "UNKNOWN_FIELD"
    for body in ({"guided_grammar": "root ::= a"}, {"structured_outputs": {"grammar": "a"}},
                 {"structured_outputs": {"structural_tag": "a"}}):  # fmt: skip
        with pytest.raises(UnimplementedError):
            read(body)


def test_one_grammar_is_enough():
    with pytest.raises(InvalidRequestError) as caught:
        read({"structured_outputs": {"json": {}, "choice": ["a"]}})
    assert caught.value.reason == "GRAMMAR_GIVEN_TWICE"


def test_what_was_checked_is_not_checked_again(monkeypatch):
    asked = []

    class CountingChild:
        def check(self, grammar):
            asked.append(grammar.text)
            if grammar.text == "(":
                raise InvalidRequestError("GRAMMAR_INVALID", "it is open", field="regex")

    monkeypatch.setattr(grammar_checks, "GrammarChild", CountingChild)
    monkeypatch.setattr(grammar_checks, "_NUM_KEPT", 2)

    async def scenario():
        checks = GrammarChecks()
        for text in ("a", "(", "a", "(", "b", "(", "a"):
            if text == "(":
                with pytest.raises(InvalidRequestError, match="it is open") as caught:
                    await checks.check(regex(text))
                assert caught.value.limits == {"field": "regex"}
            else:
                await checks.check(regex(text))

    asyncio.run(scenario())
    assert asked == ["a", "(", "b", "a"]
