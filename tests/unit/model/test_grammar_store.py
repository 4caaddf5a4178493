"""Grammars are compiled beside the steps, kept, and forgotten in turn."""

import threading

import pytest

from pageframe.core.errors import InvalidRequestError
from pageframe.executor.model import grammar_store
from pageframe.executor.model.grammar_store import GrammarStore
from unit.sampling.tiny_vocabulary import ONE, A, B, regex, vocabulary

TIMEOUT_S = 60


class HeldCompiler:
    """The real one, but each compilation waits until the test lets it go."""

    def __init__(self):
        self.released = threading.Semaphore(0)
        self.compiled = []

    def __call__(self, grammar, tokens):
        assert self.released.acquire(timeout=TIMEOUT_S)
        self.compiled.append((grammar.text, threading.current_thread().name))
        return _compile(grammar, tokens)


_compile = grammar_store.compile_grammar


@pytest.fixture
def compiler(monkeypatch):
    held = HeldCompiler()
    monkeypatch.setattr(grammar_store, "compile_grammar", held)
    return held


@pytest.fixture
def store():
    store = GrammarStore(vocabulary(), num_kept=2)
    yield store
    store.close()


def test_asking_starts_the_compilation_and_does_not_wait_for_it(store, compiler):
    assert not store.prepare(regex("ab"))
    assert not store.prepare(regex("ab"))
    compiler.released.release()
    assert store.prepare(regex("ab"), TIMEOUT_S)
    assert store.prepare(regex("ab"))
    assert [text for text, _ in compiler.compiled] == ["ab"]
    assert compiler.compiled[0][1] != threading.current_thread().name


def test_a_matcher_is_one_s_own(store):
    first = store.matcher(regex("[ab]1"))
    assert first.consume_token(A)
    assert store.matcher(regex("[ab]1")).try_consume_tokens([B, ONE]) == 2
    assert first.consume_token(ONE)


def test_the_least_recently_used_is_forgotten(store, compiler):
    compiler.released.release(5)
    for text in ("a", "b", "a", "1"):
        assert store.prepare(regex(text), TIMEOUT_S)
    assert len(store) == 2
    assert store.prepare(regex("a"))
    store.prepare(regex("b"), TIMEOUT_S)
    assert [text for text, _ in compiler.compiled] == ["a", "b", "1", "b"]


def test_what_cannot_be_compiled_is_ready_and_says_why(store):
    assert store.prepare(regex("("), TIMEOUT_S)
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match="unclosed group"):
            store.matcher(regex("("))
