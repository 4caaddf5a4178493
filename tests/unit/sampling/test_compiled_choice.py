"""Whoever chooses, kernels or NumPy and PyTorch: the same tokens, and the same rows are refused."""

import numpy as np
import pytest
import torch

from pageframe.core.errors import InternalError
from pageframe.core.sampling import SamplingParams
from pageframe.executor.model.sampler import Sampler
from unit.sampling.paths import kernels_of

NUM_ROWS = 48
KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 50, "min_p": 0.01},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "repetition_penalty": 1.3, "logit_bias": {7: 2.0}},
    {"temperature": 0.0, "frequency_penalty": 0.5},
    {"temperature": 0.9, "min_tokens": 5},
    {"temperature": 0.0, "num_logprobs": 3},
    {"temperature": 1.2, "num_logprobs": 2},
]


def make_sampler(vocab_size: int, path: str) -> Sampler:
    """Every row has a sequence, of some kind."""
    sampler = Sampler(vocab_size, NUM_ROWS, (2,), kernels=kernels_of(path))
    for row in range(NUM_ROWS):
        sampler.admit(
            row,
            sampling=SamplingParams(seed=2**63 + row, **KINDS[row % len(KINDS)]),
            sample_index=row % 3,
            token_ids=np.array([3, 7, row], np.int32),
            num_prompt_tokens=2,
        )
    return sampler


@pytest.mark.parametrize("vocab_size", [100, 257, 5001])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_both_ways_choose_the_same_tokens(vocab_size, spread):
    samplers = [make_sampler(vocab_size, path) for path in ("torch", "compiled")]
    generator = torch.Generator().manual_seed(vocab_size)
    order = np.random.default_rng(1)
    for position in range(3, 9):
        logits = torch.randn(NUM_ROWS, vocab_size, generator=generator) * spread
        logits[::2] = logits[::2].bfloat16().float()  # ties
        rows = order.permutation(NUM_ROWS).astype(np.int32)
        positions = np.full(NUM_ROWS, position, np.int32)
        by_torch, by_kernels = (it.sample(logits, rows, positions) for it in samplers)
        assert by_torch[0].tolist() == by_kernels[0].tolist()
        assert by_kernels[0].dtype == np.int32
        assert by_torch[1].keys() == by_kernels[1].keys()


@pytest.mark.parametrize("path", ["torch", "compiled"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [{"temperature": 0.0}, {"temperature": 1.0}])
def test_rows_without_a_finite_best_logit_are_named_and_nothing_is_counted(path, bad, kind):
    sampler = Sampler(300, 8, (2,), kernels=kernels_of(path))
    for row in range(8):
        sampler.admit(
            row,
            sampling=SamplingParams(frequency_penalty=2.0 if row == 0 else 0.0, seed=1, **kind),
            sample_index=0,
            token_ids=np.arange(3, dtype=np.int32),
            num_prompt_tokens=3,
        )
    logits = torch.zeros(8, 300)
    logits[5, 299] = logits[2, 0] = bad
    rows, positions = np.arange(8, dtype=np.int32), np.full(8, 3, np.int32)
    with pytest.raises(InternalError, match="row 2, 5") as refusal:
        sampler.sample(logits, rows, positions)
    assert (refusal.value.reason, refusal.value.limits["rows"]) == ("LOGITS_NOT_FINITE", "2,5")
    # Had row 0 been counted, its history would not end where this token stands.
    token_ids, _ = sampler.sample(logits.nan_to_num(0.0, 0.0), rows, positions)
    assert ((token_ids >= 0) & (token_ids < 300)).all()
