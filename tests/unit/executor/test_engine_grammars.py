"""A sequence whose grammar is still being compiled waits; one whose grammar fails ends, alone."""

from dataclasses import replace

import numpy as np
import pytest

from pageframe.core.errors import InvalidRequestError
from pageframe.core.grammar import Grammar, GrammarForm
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, RefusedBecause
from pageframe.executor.batch import StepOutput
from pageframe.executor.readiness import unready_by
from pageframe.executor.reporting import NO_TOKEN
from unit.executor.fake_runner import EOS_TOKEN_ID, VOCAB_SIZE
from unit.executor.test_engine import GREEDY, Bench
from unit.memory.memories import announcement, entries, victims

GRAMMAR = Grammar(GrammarForm.REGEX, "[0-9]+")
HELD = SamplingParams(temperature=0.0, max_tokens=50, grammar=GRAMMAR)


class Compiler:
    """Plays the runner's side: what is ready, and what was asked for."""

    def __init__(self):
        self.is_ready = False
        self.waits = []

    def prepare(self, sampling, wait_s=0.0):
        assert sampling.grammar == GRAMMAR, "only those with a grammar are asked about"
        self.waits.append(wait_s)
        return self.is_ready


@pytest.fixture
def bench():
    bench = Bench()
    bench.compiler = Compiler()
    bench.engine.find_unready = unready_by(bench.compiler.prepare)
    bench.runner.facts = replace(bench.runner.facts, takes_grammars=True)
    # The engine has read the facts already.
    bench.engine._bounds = replace(bench.engine._bounds, takes_grammars=True)
    return bench


def test_announcing_starts_the_compilation(bench):
    bench.start(1)
    bench.step(announce=[announcement(2, 4, sampling=HELD)])
    assert bench.compiler.waits == [0.0]


def test_others_go_on_while_a_grammar_is_compiled(bench):
    bench.start(1)
    result = bench.start(2, sampling=HELD)
    assert result.refused_ids == [2]
    assert result.refused_because == [RefusedBecause.NOT_READY]
    assert result.sampled_ids == [1]
    # Nobody waited for it.
    assert set(bench.compiler.waits) == {0.0}
    bench.compiler.is_ready = True
    result = bench.step(may=entries((2, 0, 4)))
    assert result.refused_ids == []
    assert result.sampled_ids == [1, 2]


def test_those_behind_one_that_is_not_ready_are_admitted(bench):
    bench.start(1)
    result = bench.step(
        announce=[announcement(2, 4, sampling=HELD), announcement(3, 4, sampling=GREEDY)],
        may=entries((2, 0, 4), (3, 0, 4)),
    )
    assert result.refused_because == [RefusedBecause.NOT_READY]
    assert result.computed_ids == [3]


def test_a_step_that_has_nothing_else_to_compute_waits_a_little(bench):
    result = bench.start(2, sampling=HELD)
    assert result.refused_ids == [2]
    assert max(bench.compiler.waits) > 0
    bench.compiler.is_ready = True
    assert bench.step(may=entries((2, 0, 4))).sampled_ids == [2]


def test_a_sequence_that_comes_back_is_asked_about_again(bench):
    bench.compiler.is_ready = True
    bench.start(1)
    bench.start(2, sampling=HELD)
    assert bench.step(victims=_certain(victims((2, 0)))).preempted_ids == [2]
    bench.compiler.is_ready = False
    assert bench.step(may=entries((2, 1, 9))).refused_because == [RefusedBecause.NOT_READY]
    bench.compiler.is_ready = True
    assert 2 in bench.step(may=entries((2, 1, 9))).sampled_ids


def test_a_running_sequence_is_not_asked_about(bench):
    bench.compiler.is_ready = True
    bench.step(announce=[announcement(2, 9, sampling=HELD)], may=entries((2, 0, 3)))
    bench.compiler.waits.clear()
    bench.compiler.is_ready = False
    result = bench.step(may=entries((2, 0, 6)))
    assert result.sampled_ids == [2]
    assert bench.compiler.waits == []


def test_a_replica_that_takes_no_grammars_says_so():
    bench = Bench()
    result = bench.start(1, sampling=HELD)
    assert (result.token_ids, result.finish_reasons) == ([NO_TOKEN], [FinishReason.ERROR])
    assert result.errors == {1: "GRAMMAR_UNAVAILABLE"}
    assert bench.engine.is_idle


def test_a_grammar_that_the_sampler_refuses_ends_its_sequence_with_the_reason(bench):
    bench.compiler.is_ready = True
    bench.start(1)
    admit = bench.runner.admit

    def refuse(row, **fields):
        admit(row, **fields)
        raise InvalidRequestError("GRAMMAR_MISMATCH", "it does not follow")

    bench.runner.admit = refuse
    result = bench.start(2, sampling=HELD)
    assert result.errors == {2: "GRAMMAR_MISMATCH"}
    assert result.sampled_ids == [2, 1]
    assert result.finish_reasons == [FinishReason.ERROR, FinishReason.NONE]
    # The caller's fault is no failure of the model.
    assert bench.engine.last_failure is None
    assert len(bench.runner.rows) == 1


def test_a_row_that_cannot_go_on_ends_with_its_last_token_and_an_error(bench):
    bench.compiler.is_ready = True
    bench.start(1)
    bench.start(2, sampling=HELD)
    row = bench.engine.memory.sequences.get(2).row
    bench.runner.execute = lambda batch: StepOutput(
        token_ids=np.where(batch.sample_rows == row, EOS_TOKEN_ID, 7).astype(np.int32),
        failures={row: "GRAMMAR_TOO_COMPLEX"},
    )
    result = bench.step()
    assert result.sampled_ids == [1, 2]
    assert result.finish_reasons == [FinishReason.NONE, FinishReason.ERROR]
    assert result.errors == {2: "GRAMMAR_TOO_COMPLEX"}
    assert bench.engine.memory.sequences.get(2) is None


def test_an_end_that_the_sampler_lets_through_is_one_whatever_min_tokens_says(bench):
    bench.compiler.is_ready = True
    bench.runner.execute = lambda batch: StepOutput(
        token_ids=np.full(len(batch.samples), EOS_TOKEN_ID, dtype=np.int32)
    )
    result = bench.start(1, sampling=replace(HELD, min_tokens=9))
    assert result.finish_reasons == [FinishReason.STOP]


@pytest.mark.parametrize("changes", [{"ignore_eos": True}, {"num_candidates": 2}])
def test_what_a_grammar_cannot_be_combined_with_is_refused(changes):
    with pytest.raises(InvalidRequestError) as caught:
        replace(HELD, **changes).validate(VOCAB_SIZE)
    assert caught.value.reason == "GRAMMAR_WITH_FIELD"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "GRAMMAR_SIZE_OUT_OF_RANGE"),
        ("a" * 65_537, "GRAMMAR_SIZE_OUT_OF_RANGE"),
        ("\ud800", "GRAMMAR_INVALID"),
    ],
)
def test_a_text_that_no_grammar_can_be_is_refused(text, reason):
    with pytest.raises(InvalidRequestError) as caught:
        Grammar(GrammarForm.JSON_SCHEMA, text).validate()
    assert caught.value.reason == reason
    Grammar(GrammarForm.REGEX, "a" * 65_536).validate()


def _certain(named):
    named.num_certain = len(named)
    return named
