"""Compiled grammars, by what they say: made on a thread of their own, never in a step.

    prepare(grammar) ──▶ thread: compile ──▶ kept, the least recently used forgotten
    matcher(grammar) ──▶ a copy, ten microseconds

Readiness is asked for at each admission, and asking starts the compilation. So nothing has to be
remembered of a sequence: one that was preempted and finds its grammar forgotten waits once more.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path

import structlog
from llguidance import LLMatcher, LLTokenizer

from pageframe.core.errors import PreconditionError
from pageframe.core.grammar import Grammar
from pageframe.executor.batch import ModelFacts
from pageframe.grammar.child import GrammarChild
from pageframe.grammar.library import compile_grammar, load_vocabulary

_NUM_KEPT = 256

_log = structlog.get_logger(__name__)


class GrammarStore:
    """One thread calls all of it.

    Args:
        vocabulary: Of the model.
        child: Reads every grammar before it is compiled here, where nothing could end it; None for
            grammars of one's own.
        num_kept: Most grammars that are kept.
    """

    def __init__(
        self,
        vocabulary: LLTokenizer,
        child: GrammarChild | None = None,
        *,
        num_kept: int = _NUM_KEPT,
    ) -> None:
        self._vocabulary = vocabulary
        self._child = child
        self._num_kept = num_kept
        self._compiled: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        # One thread: a step must not have to share the cores with several of them.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    def __len__(self) -> int:
        return len(self._compiled)

    def prepare(self, grammar: Grammar, wait_s: float = 0.0) -> bool:
        """Start to compile, unless that was done; whether the end of it is there within ``wait_s``.

        A grammar that cannot be compiled is ready, too: ``matcher`` says why it cannot.
        """
        compiling = self._compiling(grammar)
        if wait_s and not compiling.done():
            wait_for([compiling], wait_s)
        return compiling.done()

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher of one's own at the beginning of an output; waits for one that is not ready.

        Raises:
            InvalidRequestError: GRAMMAR_INVALID or GRAMMAR_TOO_COMPLEX.
        """
        return self._compiling(grammar).result().deep_copy()

    def close(self) -> None:
        """End the thread and the child."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._child is not None:
            self._child.close()

    def _compiling(self, grammar: Grammar) -> "Future[LLMatcher]":
        compiling = self._compiled.get(grammar)
        if compiling is None:
            compiling = self._thread.submit(self._compile, grammar)
            self._compiled[grammar] = compiling
            if len(self._compiled) > self._num_kept:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return compiling

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if self._child is not None:
            self._child.check(grammar)
        return compile_grammar(grammar, self._vocabulary)


def open_store(facts: ModelFacts) -> tuple[ModelFacts, GrammarStore | None]:
    """A store for a model, and its facts with that; None where tokens cannot be told apart.

    Reads the vocabulary, which has to happen before the first step: half a second.
    """
    try:
        vocabulary = load_vocabulary(Path(facts.folder), facts.vocab_size, facts.eos_token_ids)
    except PreconditionError as error:
        _log.warning("grammars_unavailable", reason=error.reason, message=str(error))
        vocabulary = None
    if vocabulary is None:
        return facts, None
    return replace(facts, takes_grammars=True), GrammarStore(vocabulary, GrammarChild())
