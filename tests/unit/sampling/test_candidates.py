"""Candidates of beams: the best tokens after edits, and nothing chosen."""

import numpy as np
import pytest
import torch

from pageframe.core.errors import InternalError
from pageframe.core.sampling import SamplingParams
from pageframe.executor.model.sampler import Sampler

VOCAB_SIZE = 300
EOS = 7


def sampler_with(*rows: tuple[int, SamplingParams], history=(3, 4, 5)) -> Sampler:
    sampler = Sampler(VOCAB_SIZE, 8, [EOS])
    for row, sampling in rows:
        token_ids = np.array(history, dtype=np.int32)
        sampler.admit(
            row, sampling=sampling, sample_index=0, token_ids=token_ids, num_prompt_tokens=2
        )
    return sampler


def candidates_of(sampler: Sampler, logits: torch.Tensor, rows, position: int = 3):
    count = len(rows)
    return sampler.candidates(
        logits, np.array(rows, dtype=np.int32), np.full(count, position, dtype=np.int32)
    )


def logits_of(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(4)) * 3


@pytest.mark.parametrize("count", [1, 5, 128, VOCAB_SIZE])
def test_they_are_the_best_of_the_models_distribution(count):
    sampler = sampler_with((2, SamplingParams(num_candidates=count)))
    logits = logits_of(1)
    (found,) = candidates_of(sampler, logits, [2])
    best = logits.log_softmax(1)[0].sort(descending=True)
    assert found.token_ids == best.indices[:count].tolist()
    assert found.logprobs == best.values[:count].tolist()


def test_rows_ask_for_different_numbers():
    sampler = sampler_with(
        (0, SamplingParams(num_candidates=2)), (1, SamplingParams(num_candidates=6))
    )
    found = candidates_of(sampler, logits_of(2), [1, 0])
    assert [len(each.token_ids) for each in found] == [6, 2]


def test_edits_change_log_probabilities_and_nothing_is_normalised_again():
    sampling = SamplingParams(
        num_candidates=VOCAB_SIZE, repetition_penalty=2.0, logit_bias={9: 5.0}, min_tokens=4
    )
    sampler = sampler_with((0, sampling))
    logits = logits_of(1)
    (found,) = candidates_of(sampler, logits, [0])
    told = dict(zip(found.token_ids, found.logprobs, strict=True))
    plain = logits.log_softmax(1)[0]
    for token_id in (3, 4, 5):
        assert told[token_id] == pytest.approx(2 * float(plain[token_id]))
    assert told[9] == pytest.approx(float(plain[9]) + 5)
    assert told[20] == pytest.approx(float(plain[20]))
    # No end before four tokens: an impossible token is not named.
    assert EOS not in told
    assert len(told) == VOCAB_SIZE - 1
    assert found.logprobs == sorted(found.logprobs, reverse=True)


def test_a_token_that_a_beam_was_given_counts_for_penalties():
    sampling = SamplingParams(num_candidates=VOCAB_SIZE, repetition_penalty=2.0)
    sampler = sampler_with((0, sampling))
    sampler.extend(0, 50)
    logits = logits_of(1)
    (found,) = candidates_of(sampler, logits, [0], position=4)
    told = dict(zip(found.token_ids, found.logprobs, strict=True))
    assert told[50] == pytest.approx(2 * float(logits.log_softmax(1)[0, 50]))


def test_beams_and_others_do_not_disturb_each_other():
    """What is sampled for a beam means nothing, and leaves no trace in its history."""
    beam = SamplingParams(num_candidates=4, repetition_penalty=1.5, min_tokens=9)
    plain = SamplingParams(seed=3, repetition_penalty=1.5)
    both, alone = sampler_with((0, beam), (1, plain)), sampler_with((1, plain))
    logits, rows = logits_of(2), np.array([0, 1], dtype=np.int32)
    positions = np.array([3, 3], dtype=np.int32)
    tokens, _ = both.sample(logits, rows, positions)
    expected, _ = alone.sample(logits[1:], rows[1:], positions[1:])
    assert tokens[1] == expected[0]
    assert both.wants_candidates(rows).tolist() == [True, False]
    # Its history still ends where its next token goes.
    candidates_of(both, logits[:1], [0])


def test_a_row_that_is_given_to_another_wants_none():
    sampler = sampler_with((0, SamplingParams(num_candidates=4)))
    sampler.release(0)
    sampler.admit(
        0,
        sampling=SamplingParams(),
        sample_index=0,
        token_ids=np.array([1], dtype=np.int32),
        num_prompt_tokens=1,
    )
    assert not sampler.wants_candidates(np.array([0], dtype=np.int32)).any()


def test_logits_that_are_no_numbers_are_an_error():
    sampler = sampler_with((0, SamplingParams(num_candidates=4)))
    logits = logits_of(1)
    logits[0, 5] = torch.nan
    with pytest.raises(InternalError) as caught:
        candidates_of(sampler, logits, [0])
    assert caught.value.reason == "LOGITS_NOT_FINITE"
