"""What is made of a row of logits has the same bits alone and in every batch, at real sizes.

A sum over a row in floating point may depend on how many rows a call is given; so weights are whole
numbers, and everything before them works on one element at a time.
"""

import numpy as np
import pytest
import torch

from pageframe.core.sampling import SamplingParams
from pageframe.executor.model.draw import Draws, total_weights
from pageframe.executor.model.sampler import Sampler
from unit.sampling.paths import PATHS, kernels_of

NUM_ROWS = 64
# That of the embedded model, and an odd one, whose rows begin anywhere in a vector.
VOCAB_SIZES = pytest.mark.parametrize("vocab_size", [49_152, 32_003])


KERNELS = None


@pytest.fixture(autouse=True, params=PATHS)
def _path(request, monkeypatch):
    monkeypatch.setitem(globals(), "KERNELS", kernels_of(request.param))


def _logits(vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    # Nearly flat: a last bit of a weight moves the draw's place in the whole vocabulary.
    return torch.randn(NUM_ROWS, vocab_size, generator=generator) * 0.5


def _draws(logits: torch.Tensor) -> Draws:
    num_rows, vocab_size = logits.shape
    return Draws(
        logits=logits,
        maxima=logits.amax(1),
        index=np.arange(num_rows),
        temperature=np.full(num_rows, 0.7, np.float32),
        top_k=np.full(num_rows, vocab_size),
        top_p=np.ones(num_rows),
        min_p=np.zeros(num_rows, np.float32),
        uniforms=np.zeros(num_rows),
        kernels=KERNELS,
    )


@VOCAB_SIZES
@pytest.mark.parametrize("size", [2, 3, 17, 64])
def test_weights_and_their_sums_have_the_same_bits(vocab_size, size):
    logits = _logits(vocab_size)
    batch = _draws(logits[:size])
    together, totals = batch.weights(batch.rows()), total_weights(batch)
    for row in {0, 1, size // 2, size - 1}:
        alone = _draws(logits[row : row + 1].clone())
        assert torch.equal(alone.weights(alone.rows())[0], together[row])
        assert torch.equal(total_weights(alone)[0], totals[row])


@VOCAB_SIZES
def test_every_kind_of_choice_is_the_same(vocab_size):
    logits = _logits(vocab_size)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 50},
        {"temperature": 2.0, "top_k": vocab_size - 1, "min_p": 0.001},
        {"temperature": 1.0, "repetition_penalty": 1.3, "logit_bias": {7: 2.0}},
    ]

    def choose(rows: list[int]) -> dict[int, tuple[int, float]]:
        sampler = Sampler(vocab_size, NUM_ROWS, (2,), kernels=KERNELS)
        for row in rows:
            sampler.admit(
                row,
                sampling=SamplingParams(seed=row, num_logprobs=0, **kinds[row % len(kinds)]),
                sample_index=0,
                token_ids=np.array([3, 7, row], np.int32),
                num_prompt_tokens=2,
            )
        positions = np.full(len(rows), 3, np.int32)
        token_ids, logprobs = sampler.sample(logits[rows], np.array(rows, np.int32), positions)
        return {
            row: (int(token_ids[place]), logprobs[place].logprob) for place, row in enumerate(rows)
        }

    alone = {row: choose([row])[row] for row in range(NUM_ROWS)}
    assert len({token_id for token_id, _ in alone.values()}) > NUM_ROWS // 2
    random = np.random.default_rng(3)
    for size in (2, 3, 16, 33, 64):
        rows = random.permutation(NUM_ROWS)[:size].tolist()
        assert choose(rows) == {row: alone[row] for row in rows}, f"batch of {size}"
