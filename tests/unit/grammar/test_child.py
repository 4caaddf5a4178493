"""Grammars are read by a process that can be ended."""

import json
import os
import signal

import pytest

from pageframe.core.errors import InvalidRequestError
from pageframe.grammar.child import GrammarChild
from unit.sampling.tiny_vocabulary import regex, schema

# The library wants to know whether any text holds all of them, and never finds out.
ENDLESS = schema(
    json.dumps({
        "type": "string",
        "allOf": [{"pattern": f"(a|b{{{n}}}).*c{{1,{n}}}d"} for n in range(1, 30)],
    })
)  # fmt: skip


@pytest.fixture
def child():
    child = GrammarChild()
    yield child
    child.close()


def test_what_is_fine_passes_and_what_is_not_is_refused_in_the_library_s_words(child):
    child.check(regex("é\n+"))
    with pytest.raises(InvalidRequestError, match="unclosed group") as caught:
        child.check(regex("("))
    assert caught.value.reason == "GRAMMAR_INVALID"
    assert caught.value.limits == {"field": "regex"}
    child.check(schema('{"type": "object"}'))


def test_what_would_never_be_read_is_refused_and_the_next_is_read(child):
    with pytest.raises(InvalidRequestError, match="more than 2 s of computing") as caught:
        child.check(ENDLESS)
    assert caught.value.reason == "GRAMMAR_TOO_COMPLEX"
    child.check(regex("a"))


def test_a_child_that_was_ended_from_outside_is_replaced(child):
    child.check(regex("a"))
    os.kill(child._child.pid, signal.SIGKILL)
    child.check(regex("b"))


def test_a_child_ends_with_its_owner(child):
    child.check(regex("a"))
    process = child._child
    process.stdin.close()
    assert process.wait(timeout=60) == 0
