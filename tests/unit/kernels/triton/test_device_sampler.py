"""Tokens that a device chooses are the sampler's, whoever else is in the batch."""

import numpy as np
import pytest
import torch

from pageframe.core.errors import InternalError
from pageframe.core.sampling import SamplingParams
from pageframe.executor.batch import DraftSamples
from pageframe.executor.model.device_sampler import NEWEST, DeviceSampler
from pageframe.executor.model.sampler import Sampler

_VOCAB_SIZE = 300
_PROMPT = [1, 5, 9]
_NUM_ROWS = 4
_GREEDY = SamplingParams(temperature=0.0, max_tokens=9)
_DRAWN = SamplingParams(temperature=0.9, top_p=0.8, seed=5, max_tokens=9)
_PENALISED = SamplingParams(temperature=0.9, presence_penalty=0.5, seed=6, max_tokens=9)
_EXPLAINED = SamplingParams(temperature=0.9, num_logprobs=2, seed=7, max_tokens=9)
_HELD_BACK = SamplingParams(temperature=0.0, min_tokens=1, stop_token_ids=(3,), max_tokens=9)
_BEAM = SamplingParams(temperature=0.0, num_candidates=4, max_tokens=9)


def _samplers(*params):
    samplers = (
        DeviceSampler(_VOCAB_SIZE, _NUM_ROWS, [2], torch.device("cpu")),
        Sampler(_VOCAB_SIZE, _NUM_ROWS, [2]),
    )
    for sampler in samplers:
        for row, each in enumerate(params):
            sampler.admit(
                row,
                sampling=each,
                sample_index=row,
                token_ids=np.array(_PROMPT, np.int32),
                num_prompt_tokens=len(_PROMPT),
            )
    return samplers


def _logits(count, seed=0):
    return torch.randn(count, _VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def _sampled(sampler, rows, positions, logits, drafts=None):
    tokens, logprobs = sampler.sample(
        logits, np.array(rows, np.int32), np.array(positions, np.int32), drafts
    )
    return tokens.tolist(), logprobs


@pytest.mark.parametrize(
    "params",
    [
        (_GREEDY, _DRAWN, _DRAWN),
        (_GREEDY, _PENALISED, _DRAWN, _EXPLAINED),
        (_HELD_BACK, _DRAWN),
    ],
    ids=["plain", "mixed", "held-back"],
)
def test_tokens_and_log_probabilities_are_the_samplers(params):
    device, host = _samplers(*params)
    rows = list(range(len(params)))
    for place in range(2):
        logits, positions = _logits(len(rows), place), [3 + place] * len(rows)
        found, expected = (_sampled(each, rows, positions, logits) for each in (device, host))
        assert found == expected


@pytest.mark.parametrize("other", [_PENALISED, _EXPLAINED, _HELD_BACK, _GREEDY])
def test_an_unedited_token_is_the_kernels_whoever_stands_beside_it(other, monkeypatch):
    device, _ = _samplers(_DRAWN, other)
    # A kernel that is off by one, to know its tokens by.
    choose = device.choose
    monkeypatch.setattr(
        device,
        "choose",
        lambda inputs, logits, tokens: (choose(inputs, logits, tokens), tokens.add_(1)),
    )
    logits = _logits(2)
    alone, _ = _sampled(device, [0], [3], logits[:1])
    beside, _ = _sampled(device, [0, 1], [3, 3], logits)
    assert beside[0] == alone[0]
    # The sampler itself chooses what is edited, and draws that itself.
    is_edited = other in (_PENALISED, _HELD_BACK)
    exact = _sampled(_samplers(_DRAWN, other)[1], [0, 1], [3, 3], logits)[0]
    assert beside == [exact[0] + 1, exact[1] + (not is_edited)]


def test_who_asks_for_more_than_a_token_is_not_plain():
    device, _ = _samplers(_GREEDY, _PENALISED, _EXPLAINED, _HELD_BACK)
    rows = np.arange(4, dtype=np.int32)
    assert device.are_plain(rows, np.full(4, 3, np.int32)).tolist() == [True, False, False, False]
    # Behind its first token nothing is held back any more.
    assert device.are_plain(rows[3:], np.array([4], np.int32)).tolist() == [True]
    beams, _ = _samplers(_BEAM, _DRAWN)
    assert beams.are_plain(rows[:2], np.full(2, 3, np.int32)).tolist() == [False, True]


def test_drafts_make_more_samples_than_there_are_rows():
    device, host = _samplers(_DRAWN, _GREEDY)
    rows, positions = [0, 0, 0, 1, 1, 1], [3, 4, 5, 3, 4, 5]
    drafts = DraftSamples(
        np.array([2, 1, 0, 2, 1, 0], np.int32), np.array([8, 9, -1, 8, 9, -1], np.int32)
    )
    logits = _logits(6)
    expected = _sampled(host, rows, positions, logits, drafts)
    assert _sampled(device, rows, positions, logits, drafts) == expected


def test_a_row_that_is_not_finite_is_named():
    device, _ = _samplers(_GREEDY, _DRAWN)
    logits = _logits(2)
    logits[1, 7] = torch.nan
    with pytest.raises(InternalError, match=r"row 1$") as caught:
        _sampled(device, [0, 1], [3, 3], logits)
    assert caught.value.reason == "LOGITS_NOT_FINITE"


def test_the_newest_token_of_a_row_is_there_before_the_host_knows_it():
    device, _ = _samplers(_GREEDY, _DRAWN, _GREEDY)
    rows = np.array([2, 0], np.int32)
    logits = _logits(2)
    logits[1] = torch.nan
    coming = device.launch(logits, rows, np.array([3, 3], np.int32))
    given = torch.tensor([NEWEST, 17, NEWEST], dtype=torch.int32)
    resolved = device.resolve(given, torch.tensor([2, 2, 0])).tolist()
    # The last one had no token; what is read for it is inside the vocabulary all the same.
    assert resolved == [int(logits[0].argmax()), 17, 0]
    assert coming.wait().tolist() == [resolved[0], -1]
