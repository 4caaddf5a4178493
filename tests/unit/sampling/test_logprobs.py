"""Reported log-probabilities are those of the raw logits."""

import numpy as np
import pytest
import torch

from pageframe.core.errors import InternalError
from pageframe.core.sampling import SamplingParams
from pageframe.executor.model.sampler import Sampler
from unit.sampling.paths import PATHS, kernels_of

KERNELS = None


@pytest.fixture(autouse=True, params=PATHS)
def _path(request, monkeypatch):
    monkeypatch.setitem(globals(), "KERNELS", kernels_of(request.param))


def make_logits(num_rows, vocab_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * 4


def sample_rows(logits, params):
    sampler = Sampler(logits.shape[1], len(params), (), "cpu", kernels=KERNELS)
    for row, sampling in enumerate(params):
        sampler.admit(
            row,
            sampling=sampling,
            sample_index=0,
            token_ids=np.array([1, 0, 1], dtype=np.int32),
            num_prompt_tokens=2,
        )
    rows = np.arange(len(params), dtype=np.int32)
    return sampler.sample(logits, rows, np.full(len(params), 3, np.int32))


def assert_describes(found, raw, token_id, num_best):
    """``found`` against a stable sort of ``raw`` [V]: equals come by id."""
    expected = raw.double().log_softmax(0)
    order = raw.sort(descending=True, stable=True).indices[:num_best]
    assert found.token_id == token_id
    assert found.logprob == pytest.approx(float(expected[token_id]), abs=1e-5)
    assert found.top_token_ids == order.tolist()
    assert found.top_logprobs == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert all(type(token) is int for token in found.top_token_ids)
    assert all(type(logprob) is float for logprob in found.top_logprobs)


@pytest.mark.parametrize("vocab_size", [2, 50, 5000, 49_152])
def test_log_softmax_of_raw_logits_whatever_the_parameters(vocab_size):
    logits = make_logits(5, vocab_size)
    params = [
        SamplingParams(temperature=0, num_logprobs=5),
        SamplingParams(num_logprobs=-1),
        SamplingParams(temperature=0.3, top_k=9, seed=1, num_logprobs=0),
        SamplingParams(temperature=2.0, repetition_penalty=1.7, seed=2, num_logprobs=20),
        SamplingParams(temperature=0, logit_bias={1: 100.0}, num_logprobs=1),
    ]
    token_ids, found = sample_rows(logits, params)
    assert sorted(found) == [0, 2, 3, 4]
    assert token_ids[4] == 1
    for index, logprobs in found.items():
        num_best = params[index].num_logprobs
        assert_describes(logprobs, logits[index], int(token_ids[index]), num_best)


def test_equals_are_listed_by_id_even_when_they_are_many():
    logits = torch.zeros(2, 20_000)
    logits[0, 500] = 3.0
    logits[1, 19_000:] = 1.0
    _, found = sample_rows(logits, [SamplingParams(temperature=0, num_logprobs=5)] * 2)
    assert found[0].top_token_ids == [500, 0, 1, 2, 3]
    assert found[1].top_token_ids == [19_000, 19_001, 19_002, 19_003, 19_004]
    assert_describes(found[1], logits[1], 19_000, 5)


def test_prompt_logprobs_describe_each_next_token():
    logits = make_logits(7, 3000)
    sampler = Sampler(3000, 4, (), "cpu", kernels=KERNELS)
    for row, num_best in ((1, 3), (2, -1), (3, 0)):
        sampler.admit(
            row,
            sampling=SamplingParams(num_prompt_logprobs=num_best),
            sample_index=0,
            token_ids=np.arange(8, dtype=np.int32),
            num_prompt_tokens=8,
        )
    assert [sampler.wants_prompt_logprobs(row) for row in range(4)] == [False, True, False, True]
    next_token_ids = np.array([1, 2, 3, 2999, 5, 6, 7], dtype=np.int32)
    found = sampler.prompt_logprobs(1, logits, next_token_ids)
    for index, token_id in enumerate(next_token_ids.tolist()):
        assert_describes(found[index], logits[index], token_id, 3)
    bare = sampler.prompt_logprobs(3, logits, next_token_ids)
    assert [one.logprob for one in bare] == [one.logprob for one in found]
    assert all(one.top_token_ids == [] for one in bare)
    # In chunks, as a chunked prefill gives them, and bit for bit the same.
    parts = [
        sampler.prompt_logprobs(1, logits[i : i + 2], next_token_ids[i : i + 2])
        for i in (0, 2, 4, 6)
    ]
    assert [one for part in parts for one in part] == found


def test_prompt_logits_with_nan_name_the_row():
    sampler = Sampler(100, 4, (), "cpu", kernels=KERNELS)
    sampler.admit(
        2,
        sampling=SamplingParams(num_prompt_logprobs=0),
        sample_index=0,
        token_ids=np.array([1, 2], dtype=np.int32),
        num_prompt_tokens=2,
    )
    with pytest.raises(InternalError) as caught:
        sampler.prompt_logprobs(2, torch.full((1, 100), torch.nan), np.array([2], np.int32))
    assert caught.value.reason == "LOGITS_NOT_FINITE"
    assert caught.value.limits["rows"] == "2"
