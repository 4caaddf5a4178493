"""What the library takes, what it refuses, and in which words."""

import json

import pytest

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.grammar.library import check_grammar, compile_grammar, load_vocabulary
from unit.gateway.tiny_tokenizers import byte_fallback, byte_level
from unit.sampling.tiny_vocabulary import OPEN, SPACE, regex, schema, vocabulary


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (regex("(a"), "unclosed group"),
        (regex("(?=a)b"), "look-ahead and look-behind, is not supported"),
        (regex(r"(a)\1"), "backreferences are not supported"),
        (schema("{"), "it is no JSON"),
        (schema("[" * 50_000), "it is no JSON"),
        (schema("[]"), "a schema is a JSON object"),
        (schema('{"type": "strin"}'), "Invalid type: strin"),
        (schema('{"type": "string", "contains": {}}'), "contains"),
        (schema('{"$ref": "http://127.0.0.1/a"}'), "retrieving it failed"),
        (schema('{"$ref": "#/a"}'), "does not exist"),
        (schema('{"const": NaN}'), "json_schema cannot be used"),
        (
            schema('{"type": "object", "required": ["a"], "additionalProperties": false}'),
            "Unsatisfiable",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_in_the_library_s_words(grammar, words):
    for refuse in (check_grammar, lambda grammar: compile_grammar(grammar, vocabulary())):
        with pytest.raises(InvalidRequestError, match=words) as caught:
            refuse(grammar)
        assert caught.value.reason == "GRAMMAR_INVALID"
        assert caught.value.limits == {"field": grammar.form.value}
        assert "\n" not in caught.value.message
        assert len(caught.value.message) < 600


def test_keywords_that_cannot_be_held_to_are_passed_over_where_the_schema_says_so():
    check_grammar(schema('{"x-guidance": {"lenient": true}, "type": "string", "contains": {}}'))


def test_fuel_runs_out_where_compiling_would_take_long():
    with pytest.raises(InvalidRequestError, match="fuel exhausted"):
        compile_grammar(schema('{"type": "integer", "multipleOf": 987654321}'), vocabulary())


def test_white_space_between_parts_is_bounded():
    matcher = compile_grammar(schema('{"type": "object"}'), vocabulary())
    assert matcher.consume_token(OPEN)
    assert matcher.try_consume_tokens([SPACE] * 100) == 32


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_tokens_of_both_kinds_of_tokenisers_are_bytes(make, tmp_path):
    folder = make(tmp_path / "model")
    entries = json.loads((folder / "tokenizer.json").read_text())
    num_tokens = len(entries["model"]["vocab"]) + len(entries["added_tokens"])
    tokens = load_vocabulary(folder, num_tokens + 64, (1,))
    assert tokens.vocab_size == num_tokens + 64
    matcher = compile_grammar(regex("the fox"), tokens)
    token_ids = tokens.greedy_tokenize("the fox")
    assert tokens.decode_bytes(token_ids) == b"the fox"
    assert matcher.try_consume_tokens(token_ids) == len(token_ids)
    assert matcher.is_accepting()


def test_a_folder_that_does_not_tell_its_tokens_has_no_vocabulary(tmp_path):
    assert load_vocabulary(tmp_path, 100, (1,)) is None
    folder = byte_level(tmp_path / "model")
    # Nothing could end an output.
    assert load_vocabulary(folder, 500, ()) is None
    assert load_vocabulary(folder, 500, (500,)) is None


def test_a_tokeniser_that_is_none_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PreconditionError) as caught:
        load_vocabulary(tmp_path, 100, (1,))
    assert caught.value.reason == "TOKENIZER_INVALID"
