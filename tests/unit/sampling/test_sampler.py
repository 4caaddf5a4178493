"""A choice depends on the row alone, and every parameter does what it says."""

import math

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from pageframe.core.errors import InternalError
from pageframe.core.sampling import SamplingParams
from pageframe.executor.model.sampler import Sampler
from unit.sampling.paths import PATHS, kernels_of

VOCAB_SIZE = 3000
EOS = (2, 7)


KERNELS = None


@pytest.fixture(autouse=True, params=PATHS)
def _path(request, monkeypatch):
    monkeypatch.setitem(globals(), "KERNELS", kernels_of(request.param))


def make_sampler(vocab_size=VOCAB_SIZE, num_rows=64):
    return Sampler(vocab_size, num_rows, EOS, "cpu", kernels=KERNELS)


def make_logits(num_rows, vocab_size=VOCAB_SIZE, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * spread


def admit(sampler, row, params, tokens=(1, 5, 9), num_prompt=3, sample_index=0):
    sampler.admit(
        row,
        sampling=params,
        sample_index=sample_index,
        token_ids=np.array(tokens, dtype=np.int32),
        num_prompt_tokens=num_prompt,
    )


def sample_one(params, logits, tokens=(1, 5, 9), num_prompt=3, sample_index=0):
    """Token and log-probabilities of one sequence by itself; ``logits`` is [V]."""
    sampler = make_sampler(len(logits), 1)
    admit(sampler, 0, params, tokens, num_prompt, sample_index)
    rows, positions = np.zeros(1, np.int32), np.array([len(tokens)], np.int32)
    token_ids, logprobs = sampler.sample(logits[None], rows, positions)
    return int(token_ids[0]), logprobs.get(0)


def random_params(rng):
    """Any mixture of features, greedy and plain ones included."""

    def pick(*values):
        return values[rng.integers(len(values))]

    return SamplingParams(
        temperature=pick(0.0, 0.7, 1.0, 1.8),
        top_k=pick(0, 0, 1, 7, 50, 1200),
        top_p=pick(1.0, 1.0, 0.5, 0.95),
        min_p=pick(0.0, 0.0, 0.03),
        repetition_penalty=pick(1.0, 1.0, 1.3, 0.8),
        presence_penalty=pick(0.0, 0.0, 0.6),
        frequency_penalty=pick(0.0, 0.0, -0.4),
        seed=int(rng.integers(2**63)),
        logit_bias=pick({}, {}, {int(rng.integers(VOCAB_SIZE)): 3.5}),
        num_logprobs=pick(-1, -1, 0, 5, 20),
        stop_token_ids=pick((), (11, 12)),
        ignore_eos=pick(True, False),
        min_tokens=pick(0, 0, 4),
        max_tokens=100,
    )


def test_plain_greedy_takes_the_lowest_of_equals():
    sampler = make_sampler(10)
    admit(sampler, 0, SamplingParams(temperature=0))
    admit(sampler, 3, SamplingParams(temperature=0))
    logits = torch.tensor([[0.0, 1, 5, 5, 2, 5, 0, 0, 0, 0], [9.0, 1, 9, 0, 0, 0, 0, 0, 0, 9]])
    rows, positions = np.array([3, 0], np.int32), np.array([3, 3], np.int32)
    token_ids, logprobs = sampler.sample(logits, rows, positions)
    assert token_ids.tolist() == [2, 0]
    assert token_ids.dtype == np.int32
    assert logprobs == {}


def test_top_k_one_is_greedy_even_among_equals():
    logits = torch.zeros(100)
    for seed in range(20):
        assert sample_one(SamplingParams(top_k=1, seed=seed), logits)[0] == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_row_gets_the_same_alone_and_in_any_batch(seed):
    rng = np.random.default_rng(seed)
    logits = make_logits(40, seed=seed)
    # Half of the rows are coarse like bfloat16: ties everywhere.
    logits[::2] = logits[::2].bfloat16().float()
    params = [random_params(rng) for _ in range(40)]
    tokens = [rng.integers(0, VOCAB_SIZE, rng.integers(5, 60)) for _ in range(40)]
    num_prompts = [int(rng.integers(1, len(known) + 1)) for known in tokens]

    def sample_together(order):
        sampler = make_sampler()
        row_of = rng.permutation(64)[: len(order)].astype(np.int32)
        for row, i in zip(row_of.tolist(), order, strict=True):
            admit(sampler, row, params[i], tokens[i], num_prompts[i], sample_index=i)
        positions = np.array([len(tokens[i]) for i in order], np.int32)
        token_ids, logprobs = sampler.sample(logits[list(order)], row_of, positions)
        return {i: (int(token_ids[k]), logprobs.get(k)) for k, i in enumerate(order)}

    alone = {}
    for i in range(40):
        alone.update(sample_together([i]))
    assert len({token for token, _ in alone.values()}) > 20, "the rows should differ"
    for size in (40, 2, 3, 9, 23, 38):
        order = rng.permutation(40)[:size].tolist()
        for i, result in sample_together(order).items():
            assert result == alone[i], f"seed {seed}, sequence {i} of {order}: {params[i]}"


def test_same_key_same_token_and_each_part_of_the_key_matters():
    logits = torch.zeros(VOCAB_SIZE)
    long = tuple(range(40))

    def token(seed=5, sample_index=0, position=3):
        params = SamplingParams(seed=seed)
        return sample_one(params, logits, long[:position], 2, sample_index)[0]

    assert token() == token()
    assert len({token(sample_index=index) for index in range(30)}) >= 29
    assert len({token(seed=seed) for seed in range(30)}) >= 29
    assert len({token(position=position) for position in range(3, 33)}) >= 29


@pytest.mark.parametrize("seed", range(3))
def test_admission_with_output_continues_as_if_never_interrupted(seed):
    rng = np.random.default_rng(seed)
    params = [random_params(rng) for _ in range(16)]
    prompts = [rng.integers(0, VOCAB_SIZE, rng.integers(1, 20)).tolist() for _ in range(16)]
    rows = np.arange(16, dtype=np.int32)

    def run(num_steps_before_preemption):
        sampler, known = make_sampler(), [list(prompt) for prompt in prompts]
        for row in range(16):
            admit(sampler, row, params[row], known[row], len(prompts[row]))
        for step in range(12):
            if step == num_steps_before_preemption:
                for row in range(16):
                    sampler.release(row)
                    admit(sampler, row, params[row], known[row], len(prompts[row]))
            # A tiny model: the logits follow from the last token and the step.
            logits = torch.stack([make_logits(1, seed=ids[-1] * 100 + step)[0] for ids in known])
            positions = np.array([len(ids) for ids in known], np.int32)
            token_ids, _ = sampler.sample(logits, rows, positions)
            for ids, token_id in zip(known, token_ids.tolist(), strict=True):
                ids.append(token_id)
        return known

    whole = run(None)
    assert run(1) == whole
    assert run(7) == whole


def test_repetition_penalty_is_that_of_hugging_face():
    logits = make_logits(1)[0]
    prompt, output = [int(logits.argmax()), 4, 4], [8, int(logits.topk(2).indices[1])]
    for penalty in (1.0001, 1.5, 0.5, 20.0):
        params = SamplingParams(temperature=0, repetition_penalty=penalty)
        scores = RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([prompt + output]), logits[None].clone()
        )
        token, _ = sample_one(params, logits, prompt + output, 3)
        assert token == int(scores[0].argmax())


@pytest.mark.parametrize("seed", range(30))
def test_penalties_equal_a_plain_loop_over_the_history(seed):
    rng = np.random.default_rng(seed)
    # A small vocabulary, so that tokens repeat and penalties change the choice.
    logits = make_logits(1, vocab_size=12, seed=seed, spread=1.0)[0]
    prompt = rng.integers(0, 12, 6).tolist()
    output = rng.integers(0, 12, rng.integers(0, 30)).tolist()
    params = SamplingParams(
        temperature=0,
        repetition_penalty=float(rng.uniform(0.5, 2)),
        presence_penalty=float(rng.uniform(-1, 1)),
        frequency_penalty=float(rng.uniform(-0.5, 0.5)),
    )
    scores = logits.double().tolist()
    for token in set(prompt + output):
        repetition = params.repetition_penalty
        scores[token] *= 1 / repetition if scores[token] > 0 else repetition
    for token in output:
        scores[token] -= params.frequency_penalty
    for token in set(output):
        scores[token] -= params.presence_penalty
    token, _ = sample_one(params, logits, prompt + output, 6)
    assert token == int(np.argmax(scores))


def test_history_grows_with_what_was_sampled():
    # Two equal tokens and a frequency penalty: they must take turns.
    logits = torch.full((1, 100), -50.0)
    logits[0, [40, 60]] = 10.0
    sampler = make_sampler(100)
    admit(sampler, 0, SamplingParams(temperature=0, frequency_penalty=0.25), (40, 40), 2)
    rows = np.zeros(1, np.int32)
    drawn = [
        int(sampler.sample(logits, rows, np.array([2 + step], np.int32))[0][0]) for step in range(6)
    ]
    assert drawn == [40, 60, 40, 60, 40, 60]


def test_a_penalty_near_zero_stays_finite():
    logits = make_logits(1)[0].abs() + 1
    params = SamplingParams(repetition_penalty=1e-300, seed=4)
    assert sample_one(params, logits, (6, 6, 6), 3)[0] == 6


def test_logit_bias_of_a_hundred_forces_and_forbids():
    logits = make_logits(1)[0]
    best = int(logits.argmax())
    second = int(logits.topk(2).indices[1])
    assert sample_one(SamplingParams(temperature=0, logit_bias={17: 100.0}), logits)[0] == 17
    assert sample_one(SamplingParams(seed=3, logit_bias={17: 100.0}), logits)[0] == 17
    assert sample_one(SamplingParams(temperature=0, logit_bias={best: -100.0}), logits)[0] == second
    forbidden = dict.fromkeys(logits.topk(1000).indices.tolist(), -100.0)
    for seed in range(10):
        token, _ = sample_one(SamplingParams(seed=seed, logit_bias=forbidden), logits)
        assert token not in forbidden


def test_biases_of_several_rows_do_not_mix():
    sampler, logits = make_sampler(), make_logits(1).repeat(3, 1)
    admit(sampler, 0, SamplingParams(temperature=0, logit_bias={100: 90.0}))
    admit(sampler, 1, SamplingParams(temperature=0))
    admit(sampler, 2, SamplingParams(temperature=0, logit_bias={200: 90.0, 201: 80.0}))
    rows, positions = np.array([2, 1, 0], np.int32), np.full(3, 3, np.int32)
    token_ids, _ = sampler.sample(logits, rows, positions)
    assert token_ids.tolist() == [200, int(logits[0].argmax()), 100]


@pytest.mark.parametrize(
    ("ignore_eos", "stop_token_ids", "held_back"),
    [
        (False, (), {2, 7}),
        (True, (), set()),
        (False, (5,), {2, 5, 7}),
        (True, (5, 7), {5, 7}),
    ],
)
def test_min_tokens_holds_back_what_would_stop(ignore_eos, stop_token_ids, held_back):
    logits = torch.full((20,), -1.0)
    logits[[2, 5, 7]] = 30.0
    logits[9] = 10.0
    possible = [token for token in (2, 5, 7) if token not in held_back]
    for num_outputs in range(5):
        params = SamplingParams(
            temperature=0,
            min_tokens=3,
            ignore_eos=ignore_eos,
            stop_token_ids=stop_token_ids,
        )
        tokens = [1, 1, *[9] * num_outputs]
        expected = (possible or [9])[0] if num_outputs < 3 else 2
        assert sample_one(params, logits, tokens, 2)[0] == expected


def test_min_tokens_wins_over_bias():
    params = SamplingParams(temperature=0, min_tokens=1, logit_bias={2: 100.0})
    assert sample_one(params, make_logits(1)[0])[0] != 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_is_named_and_nothing_is_counted(bad):
    sampler, logits = make_sampler(), make_logits(4)
    for row in range(4):
        admit(sampler, row, SamplingParams(temperature=0, frequency_penalty=0.1))
    rows, positions = np.array([3, 0, 2, 1], np.int32), np.full(4, 3, np.int32)
    spoilt = logits.clone()
    spoilt[2, 1234] = bad
    spoilt[0] = -math.inf
    with pytest.raises(InternalError) as caught:
        sampler.sample(spoilt, rows, positions)
    assert caught.value.reason == "LOGITS_NOT_FINITE"
    assert caught.value.limits["rows"] == "2,3"
    # The same step can be sampled again, for its histories have not moved.
    assert sampler.sample(logits, rows, positions)[0].tolist() == logits.argmax(1).tolist()


def test_some_impossible_tokens_are_no_fault():
    logits = torch.full((VOCAB_SIZE,), -math.inf)
    logits[[50, 60]] = 1.0
    for seed in range(10):
        for params in (SamplingParams(seed=seed), SamplingParams(seed=seed, top_k=5, top_p=0.9)):
            assert sample_one(params, logits)[0] in {50, 60}


def test_logits_are_left_unchanged():
    rng = np.random.default_rng(0)
    sampler, logits = make_sampler(), make_logits(40)
    before = logits.clone()
    for row in range(40):
        admit(sampler, row, random_params(rng))
    sampler.sample(logits, np.arange(40, dtype=np.int32), np.full(40, 3, np.int32))
    assert torch.equal(logits, before)


def test_a_row_must_be_free_to_admit_and_in_use_to_sample():
    sampler = make_sampler()
    admit(sampler, 1, SamplingParams())
    with pytest.raises(AssertionError, match="row 1 is in use"):
        admit(sampler, 1, SamplingParams())
    with pytest.raises(AssertionError, match=r"rows \[2\] are not in use"):
        sampler.sample(make_logits(2), np.array([1, 2], np.int32), np.full(2, 3, np.int32))
    sampler.release(1)
    with pytest.raises(AssertionError, match="row 1 is not in use"):
        sampler.release(1)


def test_a_position_that_is_not_the_end_of_the_history_is_our_bug():
    sampler = make_sampler()
    admit(sampler, 0, SamplingParams(presence_penalty=0.5))
    with pytest.raises(AssertionError, match="row 0 has 3 tokens, not 4"):
        sampler.sample(make_logits(1), np.zeros(1, np.int32), np.array([4], np.int32))


def test_release_forgets_features():
    sampler, logits = make_sampler(), make_logits(1)
    biased = SamplingParams(temperature=0, logit_bias={17: 100.0}, num_logprobs=2, min_tokens=2)
    admit(sampler, 0, biased)
    sampler.release(0)
    admit(sampler, 0, SamplingParams(temperature=0))
    token_ids, logprobs = sampler.sample(logits, np.zeros(1, np.int32), np.array([3], np.int32))
    assert token_ids.tolist() == logits.argmax(1).tolist()
    assert logprobs == {}


def test_a_row_whose_admission_failed_half_way_can_be_released_and_used_again(monkeypatch):
    sampler = make_sampler()

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(sampler._edits, "admit", fail)
        with pytest.raises(MemoryError):
            admit(sampler, 3, SamplingParams(temperature=0.0, max_tokens=1))
    sampler.release(3)
    admit(sampler, 3, SamplingParams(temperature=0.0, max_tokens=1))
