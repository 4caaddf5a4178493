"""Searches by blocks find what a search of the whole vocabulary finds."""

import numpy as np
import pytest
import torch

from pageframe.executor.model.selection import (
    best_token,
    best_token_by_blocks,
    best_tokens,
    sorted_values,
)

VOCAB_SIZES = [1, 31, 32, 33, 255, 256, 257, 1000, 4096, 10_007]

# The first is what a host does, the second what a device does.
on_host_and_device = pytest.mark.parametrize("find", [best_token, best_token_by_blocks])


@on_host_and_device
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_best_token_is_the_first_of_equals(vocab_size, find):
    generator = torch.Generator().manual_seed(vocab_size)
    # Few distinct values: almost every row has ties, inside blocks and across them.
    logits = torch.randint(-3, 3, (40, vocab_size), generator=generator).float()
    maxima, ids = find(logits)
    assert ids.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert torch.equal(maxima, logits.amax(1))


@on_host_and_device
def test_best_token_shows_nan_and_infinity(find):
    logits = torch.zeros(4, 1000)
    logits[0, 700] = torch.nan
    logits[1, 700] = torch.inf
    logits[2] = -torch.inf
    maxima, _ = find(logits)
    assert torch.isnan(maxima[0])
    assert maxima[1:].tolist() == [torch.inf, -torch.inf, 0.0]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("count", [1, 5, 64])
@pytest.mark.parametrize("is_tied", [False, True])
def test_best_tokens_have_the_values_of_a_full_search(vocab_size, count, is_tied):
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(10, vocab_size, generator=generator)
    if is_tied:
        logits = logits.round()
    count = min(count, vocab_size)
    values, ids = best_tokens(logits, count)
    assert torch.equal(values, logits.topk(count, 1).values)
    assert torch.equal(values, logits.gather(1, ids))
    assert all(len(set(row)) == count for row in ids.tolist())


def test_best_tokens_next_to_impossible_ones():
    logits = torch.full((2, 5000), -torch.inf)
    logits[0, [17, 4999]] = torch.tensor([1.0, 2.0])
    logits[1, 0] = 3.0
    values, ids = best_tokens(logits, 4)
    assert values.tolist() == [[2.0, 1.0, -np.inf, -np.inf], [3.0] + 3 * [-np.inf]]
    assert ids[0, :2].tolist() == [4999, 17]
    assert ids[1, 0] == 0


def test_sorted_values_are_sorted_and_leave_logits_alone():
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    assert torch.equal(sorted_values(logits), before.sort(1, descending=True).values)
    assert torch.equal(logits, before)
