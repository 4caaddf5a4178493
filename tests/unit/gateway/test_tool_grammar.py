"""Which outputs a grammar of calls lets through."""

import json

import pytest

from pageframe.core.errors import InvalidRequestError
from pageframe.gateway.http.tool_grammar import Function, call_grammar
from pageframe.grammar.library import compile_grammar, load_vocabulary
from unit.gateway.tiny_tokenizers import byte_level

END_TOKEN_ID = 1
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string"}},
}


def function(name, parameters, *, is_strict=False):
    return Function(name=name, parameters=parameters, is_strict=is_strict, path="f")


WEATHER, CLOCK = function("weather", CITY), function("clock.now", None)


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


ROME = call("weather", {"city": "Rom </tool_call> \n"})
NOW = call("clock.now", {})


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = byte_level(tmp_path_factory.mktemp("model"))
    return load_vocabulary(folder, 512, (END_TOKEN_ID,))


def takes(vocabulary, text, *, is_forced, is_parallel):
    """Whether an output may be ``text`` and end there."""
    grammar = call_grammar([WEATHER, CLOCK], is_forced=is_forced, is_parallel=is_parallel)
    matcher = compile_grammar(grammar, vocabulary)
    token_ids = vocabulary.tokenize_str(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("text", "forced", "forced_once", "free", "free_once"),
    [
        (ROME, True, True, True, True),
        (NOW, True, True, True, True),
        (f"{ROME}\n{NOW}", True, False, True, False),
        (f"I look.\n{ROME}", False, False, True, True),
        (f"{ROME}\nSo it is.", False, False, True, False),
        ("plain <tool", False, False, True, True),
        ("", False, False, True, True),
        (call("weather", {"town": "Rom"}), False, False, False, False),
        (call("clock.now", {"zone": 1}), False, False, False, False),
        (call("other", {}), False, False, False, False),
        (NOW.removesuffix("\n</tool_call>"), False, False, False, False),
    ],
)
def test_what_may_be_said(vocabulary, text, forced, forced_once, free, free_once):
    for is_forced, is_parallel, expected in (
        (True, True, forced),
        (True, False, forced_once),
        (False, True, free),
        (False, False, free_once),
    ):
        found = takes(vocabulary, text, is_forced=is_forced, is_parallel=is_parallel)
        assert found == expected, (is_forced, is_parallel)


def test_keywords_that_cannot_be_held_to_are_refused_of_strict_functions_only(vocabulary):
    odd = {"properties": {"a": {"type": "array", "unevaluatedItems": False}}}
    tolerant = call_grammar([function("f", odd)], is_forced=True, is_parallel=True)
    compile_grammar(tolerant, vocabulary)
    strict = call_grammar([function("f", odd, is_strict=True)], is_forced=True, is_parallel=True)
    with pytest.raises(InvalidRequestError, match="unevaluatedItems"):
        compile_grammar(strict, vocabulary)


def test_arguments_are_an_object_whatever_the_schema_leaves_open():
    assert json.loads(function("f", {}).schema())["type"] == "object"
    assert json.loads(function("f", {"type": ["object", "null"]}).schema())["type"] == "object"
    with pytest.raises(InvalidRequestError) as caught:
        function("f", {"type": "string"}).schema()
    assert caught.value.limits == {"field": "f.parameters.type"}


def test_a_schema_does_not_choose_how_it_is_read():
    schema = function("f", {"x-guidance": {"whitespace_pattern": ".*"}}).schema()
    assert ".*" not in schema
