"""Samples behind drafts: what counts is what one token after the other would have given."""

import numpy as np
import pytest
import torch

from pageframe.core.sampling import SamplingParams
from pageframe.executor.batch import DraftSamples
from unit.sampling.test_sampler import VOCAB_SIZE, admit, make_logits, make_sampler, random_params

NUM_ROWS = 16
NUM_DRAFTS = 3


def sample_in_turn(params, prompts, logits, num_tokens):
    """Tokens and log-probabilities of each row, one after the other; logits are [row][place]."""
    sampler = make_sampler()
    for row, param in enumerate(params):
        admit(sampler, row, param, prompts[row], len(prompts[row]) - 1)
    rows = np.arange(len(params), dtype=np.int32)
    tokens = [[] for _ in params]
    logprobs = [[] for _ in params]
    for place in range(num_tokens):
        positions = np.array([len(prompt) + place for prompt in prompts], np.int32)
        found, entries = sampler.sample(logits[:, place], rows, positions)
        for row, token_id in enumerate(found.tolist()):
            tokens[row].append(token_id)
            logprobs[row].append(entries.get(row))
    return tokens, logprobs


def drafts_of(guesses) -> DraftSamples:
    num_behind, expected = [], []
    for guess in guesses:
        num_behind += range(len(guess), -1, -1)
        expected += [*guess, -1]
    return DraftSamples(np.array(num_behind, np.int32), np.array(expected, np.int32))


@pytest.mark.parametrize("seed", range(6))
def test_what_counts_is_what_comes_one_by_one(seed):
    rng = np.random.default_rng(seed)
    params = [random_params(rng) for _ in range(NUM_ROWS)]
    prompts = [rng.integers(0, VOCAB_SIZE, rng.integers(2, 20)).tolist() for _ in range(NUM_ROWS)]
    num_places = 2 * (NUM_DRAFTS + 1)
    logits = make_logits(NUM_ROWS * num_places, seed=seed).view(NUM_ROWS, num_places, -1)
    expected, expected_logprobs = sample_in_turn(params, prompts, logits, num_places)

    sampler = make_sampler()
    for row, param in enumerate(params):
        admit(sampler, row, param, prompts[row], len(prompts[row]) - 1)
    done = np.zeros(NUM_ROWS, dtype=int)
    # Two steps, so that what the first counted in histories shows in the second.
    for _ in range(2):
        lengths = rng.integers(0, NUM_DRAFTS + 1, NUM_ROWS)
        num_right = rng.integers(0, NUM_DRAFTS + 1, NUM_ROWS)
        guesses = []
        for row in range(NUM_ROWS):
            guess = expected[row][done[row] : done[row] + lengths[row]]
            for place in range(num_right[row], len(guess)):
                guess[place] = (guess[place] + 1) % VOCAB_SIZE
            guesses.append(guess)
        rows = np.repeat(np.arange(NUM_ROWS, dtype=np.int32), lengths + 1)
        places = np.concatenate(
            [done[row] + np.arange(lengths[row] + 1) for row in range(NUM_ROWS)]
        )
        ends = np.array([len(prompt) for prompt in prompts])
        positions = (ends[rows] + places).astype(np.int32)
        token_ids, logprobs = sampler.sample(
            logits[rows, places], rows, positions, drafts_of(guesses)
        )
        start = 0
        for row in range(NUM_ROWS):
            num_kept = min(lengths[row], num_right[row]) + 1
            kept = slice(done[row], done[row] + num_kept)
            assert token_ids[start : start + num_kept].tolist() == expected[row][kept], params[row]
            found = [logprobs.get(start + k) for k in range(num_kept)]
            assert found == expected_logprobs[row][kept]
            start += lengths[row] + 1
            done[row] += num_kept
    assert done.max() > NUM_DRAFTS


def test_a_penalty_of_a_kept_draft_holds_behind_it():
    # Token 1 is best twice; a frequency penalty lets token 2 win once 1 has come.
    logits = torch.tensor([[0.0, 5, 4, 0], [0.0, 5, 4, 0]])
    sampler = make_sampler(vocab_size=4)
    admit(sampler, 0, SamplingParams(temperature=0, frequency_penalty=2.0), (3,), 1)
    rows, positions = np.zeros(2, np.int32), np.array([1, 2], np.int32)
    token_ids, _ = sampler.sample(logits, rows, positions, drafts_of([[1]]))
    assert token_ids.tolist() == [1, 2]


def test_what_does_not_count_is_not_in_the_history():
    sampler = make_sampler(vocab_size=4)
    admit(sampler, 0, SamplingParams(temperature=0, frequency_penalty=2.0), (3,), 1)
    logits = torch.tensor([[0.0, 5, 4, 0], [0.0, 0, 5, 4]])
    rows, positions = np.zeros(2, np.int32), np.array([1, 2], np.int32)
    sampler.sample(logits, rows, positions, drafts_of([[2]]))
    # Only token 1 has come, at position 1; 2 was never sampled at position 2.
    next_logits = torch.tensor([[0.0, 0, 5, 4]])
    token_ids, _ = sampler.sample(next_logits, rows[:1], np.array([2], np.int32))
    assert token_ids.tolist() == [2]


def test_a_stop_token_is_held_back_behind_drafts_too():
    sampler = make_sampler(vocab_size=10)
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(5,), ignore_eos=True)
    admit(sampler, 0, params, (3,), 1)
    logits = torch.zeros(3, 10)
    logits[:, 5] = 9
    rows, positions = np.zeros(3, np.int32), np.array([1, 2, 3], np.int32)
    token_ids, _ = sampler.sample(logits, rows, positions, drafts_of([[0, 0]]))
    # Two other tokens first; from the third on it may come.
    assert token_ids.tolist() == [0, 0, 5]
