"""Steps that are ready before the one ahead of them is over: the same tokens, bit by bit."""

import numpy as np
import pytest

from pageframe.core.clock import SystemClock
from pageframe.core.plan import StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.core.trace import NullTraceSink
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.fused import FusedDecoder
from pageframe.executor.model.loader import load_runner
from pageframe.kernels.cpu import library
from unit.executor.small_engine import request
from unit.memory.memories import entries
from unit.model.test_fused import _load, _step, folder  # noqa: F401, the fixture

_KINDS = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.9, "seed": 5},
    "filtered": {"temperature": 1.3, "seed": 6, "top_k": 9, "top_p": 0.8, "min_p": 0.02},
    "penalised": {"temperature": 0.7, "seed": 7, "repetition_penalty": 1.3},
    "told": {"temperature": 0.0, "num_logprobs": 2},
    "held back": {"temperature": 0.0, "min_tokens": 9},
}


@pytest.fixture(scope="module", autouse=True)
def _needs_kernels():
    if library.choose().library is None:
        pytest.skip(library.choose().reason)


def make_engine(path, *, is_ahead):
    runner = load_runner(path, num_threads=1, dtype="float32", device="cpu")
    if not is_ahead:
        runner._lane = None
    return StepEngine(
        runner,
        num_blocks=64,
        block_size=16,
        max_num_sequences=8,
        max_step_tokens=64,
        max_model_len=128,
        trace=NullTraceSink(),
        clock=SystemClock(),
        check_every_step=True,
    )


def serve(path, kinds, *, is_ahead, num_steps=40):
    """Tokens and log-probabilities by sequence, of requests of some kinds that run together."""
    engine = make_engine(path, is_ahead=is_ahead)
    requests = [
        request(
            number,
            range(1, 4 + number),
            sampling=SamplingParams(max_tokens=12 + 3 * number, **_KINDS[kind]),
        )
        for number, kind in enumerate(kinds, 1)
    ]
    results = [engine.step(StepPlan(step=1, builds_on=0, announce=requests))]
    may = entries(*((each.sequence_id, 0, len(each.token_ids)) for each in requests))
    results.append(engine.step(StepPlan(step=2, builds_on=1, may=may)))
    for step in range(3, num_steps):
        plan = StepPlan(step=step, builds_on=step - 1)
        if engine.launching.num_in_flight and not engine.launching.may_follow(plan):
            results.append(engine.collect())
        engine.launch(plan)
        if engine.launching.num_in_flight > 1:
            results.append(engine.collect())
        if engine.launching.flight_under_way() is None:
            results.append(engine.collect())
    while engine.launching.num_in_flight:
        results.append(engine.collect())
    engine.close()
    assert any(result.is_followed for result in results) is is_ahead
    found = {}
    for result in results:
        for place, sequence_id in enumerate(result.sampled_ids):
            told = result.logprobs.get(place)
            found.setdefault(sequence_id, []).append((result.token_ids[place], told))
    assert engine.last_failure is None
    assert engine.is_idle
    return found


@pytest.mark.parametrize("kinds", [[kind] for kind in _KINDS] + [list(_KINDS), ["drawn"] * 5])
def test_tokens_do_not_depend_on_what_was_ready_before(folder, kinds):  # noqa: F811
    path = folder()
    assert serve(path, kinds, is_ahead=True) == serve(path, kinds, is_ahead=False)


def test_what_takes_python_is_not_prepared(folder):  # noqa: F811
    runner = _load(folder())
    for row, (kind, is_plain) in enumerate(
        {
            "greedy": True,
            "drawn": True,
            "penalised": False,
            "told": False,
            "held back": False,
        }.items()
    ):
        runner.admit(
            row,
            sampling=SamplingParams(**_KINDS[kind]),
            sample_index=0,
            token_ids=np.arange(4, dtype=np.int32),
            num_prompt_tokens=4,
        )
        sampler = runner._sampler
        rows, positions = np.array([row], np.int32), np.array([4], np.int32)
        assert sampler.is_plain(rows, positions) is is_plain, kind
    assert sampler.is_plain(np.array([4], np.int32), np.array([13], np.int32)), "behind its bound"
    runner.close()


def test_logits_that_are_no_numbers_fail_the_step(folder, monkeypatch):  # noqa: F811
    engine = make_engine(folder(), is_ahead=True)
    engine.step(StepPlan(step=1, builds_on=0, announce=[request(1, [1, 2, 3])]))
    engine.step(StepPlan(step=2, builds_on=1, may=entries((1, 0, 3))))

    prepare_decode = FusedDecoder.prepare_decode

    def broken(*arguments):
        run, choice = prepare_decode(*arguments)

        def run_badly():
            run()
            choice.maxima[:] = np.nan

        return run_badly, choice

    monkeypatch.setattr(FusedDecoder, "prepare_decode", broken)
    result = engine.step(StepPlan(step=3, builds_on=2))
    assert result.finish_reasons == [FinishReason.ERROR]
    assert "LOGITS_NOT_FINITE" in str(engine.last_failure.__cause__)
    assert engine.is_idle
    engine.close()


def test_nothing_follows_a_step_in_which_a_search_goes_on(folder):  # noqa: F811
    runner = _load(folder())
    runner.admit(
        0,
        sampling=SamplingParams(num_candidates=3),
        sample_index=0,
        token_ids=np.arange(9, dtype=np.int32),
        num_prompt_tokens=9,
    )
    flight = runner.launch(_step(runner, 0, 9, 16))
    assert not flight.is_ahead
    assert flight.collect().candidates.keys() == {0}
    runner.close()
