"""When to try again, and what to ask then."""

from dataclasses import replace

import pytest

from pageframe.client.attempts import Attempts
from pageframe.client.types import Delta, Finished, GenerationRequest, MemoryAccount, Started
from pageframe.core.beams import BeamParams
from pageframe.core.errors import InvalidRequestError, UnavailableError
from pageframe.core.step import FinishReason, TokenLogprobs

GONE = UnavailableError("TRANSPORT", "gone")
STARTED = Started(request_id="r", seed=9, trace_id="", num_prompt_tokens=1, model="m")


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def _attempts(clock=None, **fields):
    request = GenerationRequest(**({"prompt": "x"} | fields))
    return Attempts(request, retry_for_s=1.0, now_s=clock or Clock())


def _finished(sample_index=0):
    return Finished(
        sample_index=sample_index,
        finish_reason=FinishReason.LENGTH,
        stop="",
        account=MemoryAccount(),
    )


def test_the_first_attempt_asks_what_was_asked():
    request = _attempts(request_id="mine").request()
    assert request == GenerationRequest(prompt="x", request_id="mine")


def test_a_broken_stream_is_resumed_with_its_seed_under_another_name():
    attempts = _attempts(resume_token_ids=[1], seed=3)
    assert attempts.accept(STARTED)
    assert attempts.accept(Delta(sample_index=0, text="a", token_ids=[2, 3]))
    attempts.delay_after(GONE)
    again = attempts.request()
    assert (again.seed, again.resume_outputs, again.request_id) == (9, [[1, 2, 3]], "r~1")
    assert again.resume_token_ids == ()


def test_the_header_is_seen_once():
    attempts = _attempts()
    assert attempts.accept(STARTED)
    assert not attempts.accept(STARTED)


def test_errors_that_will_not_pass_are_not_tried_again():
    with pytest.raises(InvalidRequestError):
        _attempts().delay_after(InvalidRequestError("EMPTY_PROMPT", "empty"))


def test_all_samples_are_resumed_those_that_ended_and_those_without_output_too():
    attempts = _attempts(num_samples=3)
    attempts.accept(STARTED)
    attempts.delay_after(GONE)
    assert attempts.request().resume_outputs == ()
    attempts.accept(Delta(sample_index=1, text="a", token_ids=[2, 3]))
    attempts.accept(Delta(sample_index=2, text="b", token_ids=[4]))
    attempts.accept(_finished(2))
    attempts.delay_after(GONE)
    assert attempts.request().resume_outputs == [[], [2, 3], [4]]


def test_what_was_heard_of_a_sample_that_had_ended_is_not_heard_again():
    attempts = _attempts(num_samples=2)
    attempts.accept(STARTED)
    assert attempts.accept(_finished(1)) is not None
    attempts.delay_after(GONE)
    rest = Delta(sample_index=1, text="held back before", token_ids=[])
    assert attempts.accept(rest) is None
    assert attempts.accept(_finished(1)) is None
    assert not attempts.is_done
    attempts.accept(_finished(0))
    assert attempts.is_done


def test_the_rest_of_a_text_is_heard_once_though_its_end_was_lost():
    attempts = _attempts()
    attempts.accept(Delta(sample_index=0, text="a", token_ids=[2]))
    rest = Delta(sample_index=0, text="b", token_ids=[])
    assert attempts.accept(rest) == rest
    attempts.delay_after(GONE)
    assert attempts.accept(rest) is None
    assert attempts.accept(_finished()) is not None


def test_figures_of_the_prompt_are_heard_once():
    figures = [TokenLogprobs(token_id=3, logprob=-1.0)]
    delta = Delta(sample_index=0, text="a", token_ids=[2], prompt_logprobs=figures)
    attempts = _attempts()
    assert attempts.accept(delta) == delta
    attempts.delay_after(GONE)
    assert attempts.accept(delta) == replace(delta, prompt_logprobs=[])
    assert attempts.request().resume_outputs == [[2, 2]]


def test_patience_ends_without_progress_and_begins_anew_with_it():
    clock = Clock()
    attempts = _attempts(clock)
    assert attempts.delay_after(GONE) < attempts.delay_after(GONE)
    clock.now_s = 1.5
    with pytest.raises(UnavailableError):
        attempts.delay_after(GONE)
    attempts.accept(STARTED)
    assert attempts.delay_after(GONE) > 0


def test_a_generation_is_done_when_all_samples_have_ended():
    attempts = _attempts(num_samples=2)
    attempts.accept(_finished(1))
    assert not attempts.is_done
    attempts.accept(_finished(0))
    assert attempts.is_done


@pytest.mark.parametrize(
    "fields", [{"best_of": 2}, {"beam_search": BeamParams(num_beams=2, num_return=1)}]
)
def test_outputs_that_are_ranked_start_over_as_long_as_none_is_known(fields):
    attempts = _attempts(**fields)
    attempts.accept(STARTED)
    attempts.delay_after(GONE)
    assert attempts.request().resume_outputs == ()
    attempts.accept(Delta(sample_index=0, text="a", token_ids=[2]))
    with pytest.raises(UnavailableError):
        attempts.delay_after(GONE)


def test_a_search_is_done_when_all_it_returns_has_come():
    attempts = _attempts(beam_search=BeamParams(num_beams=4, num_return=2))
    attempts.accept(_finished())
    assert not attempts.is_done
    attempts.accept(_finished(1))
    assert attempts.is_done


def test_another_name_is_no_longer_than_names_may_be():
    attempts = _attempts(request_id="é" * 64)
    attempts.delay_after(GONE)
    again = attempts.request().request_id
    assert again == "é" * 63 + "~1"
    assert len(again.encode()) == 128
