"""Drawn tokens follow exactly the distribution that Hugging Face's filters leave."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pageframe.executor.model import draw as draw_module
from pageframe.executor.model.draw import WEIGHT_ONE, Draws, draw, total_weights
from pageframe.executor.model.philox import uniform
from unit.sampling.paths import PATHS, kernels_of

# The longest one makes the short list a search by blocks.
VOCAB_SIZES = [3, 100, 1000, 20_037]
FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 1500},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"min_p": 0.9},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.5, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 1.5, "top_k": 1100, "top_p": 0.95},
]


KERNELS = None


@pytest.fixture(autouse=True, params=PATHS)
def _path(request, monkeypatch):
    monkeypatch.setitem(globals(), "KERNELS", kernels_of(request.param))


def make_draws(logits, uniforms, *, index=None, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    count, vocab_size = len(uniforms), logits.shape[1]
    return Draws(
        logits=logits,
        maxima=logits.amax(1),
        index=np.zeros(count, np.int64) if index is None else np.array(index),
        temperature=np.full(count, temperature, np.float32),
        top_k=np.full(count, min(top_k or vocab_size, vocab_size)),
        top_p=np.full(count, top_p, np.float64),
        min_p=np.full(count, min_p, np.float32),
        uniforms=np.array(uniforms, np.float64),
        kernels=KERNELS,
    )


def reference_probabilities(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What Hugging Face would sample from, in float64."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    scores = processors(None, logits.double()[None])
    return scores.softmax(-1)[0].numpy()


def edges_of(probabilities):
    """Uniforms just inside both ends of each kept token's interval, and the tokens."""
    # Sums of float32 weights are good to a few parts in ten million.
    kept = np.flatnonzero(probabilities > 4e-6)
    high = probabilities.cumsum()[kept]
    low = high - probabilities[kept]
    inset = np.maximum(0.05 * probabilities[kept], 1e-6)
    return np.concatenate((low + inset, high - inset)), np.concatenate((kept, kept))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_every_kept_token_has_its_interval_and_no_other_has_one(vocab_size, filters, spread):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(vocab_size, generator=generator) * spread
    uniforms, expected = edges_of(reference_probabilities(logits, **filters))
    # At both ends of every interval: one token too many or too few would move them all.
    some = np.random.default_rng(1).permutation(len(uniforms))[:600]
    drawn = draw(make_draws(logits[None], uniforms[some], **filters))
    assert drawn.tolist() == expected[some].tolist()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_counts_of_drawn_tokens_fit_the_exact_distribution(filters):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 1.5
    probabilities = reference_probabilities(logits, **filters)
    num_draws = 20_000
    positions = np.arange(num_draws)
    uniforms = uniform(np.full(num_draws, 11, np.uint64), np.zeros_like(positions), positions)
    drawn = draw(make_draws(logits[None], uniforms, **filters))
    counts, expected = np.bincount(drawn, minlength=50), num_draws * probabilities
    assert counts[probabilities == 0].sum() == 0
    # Tokens too rare for the approximation are counted as one.
    is_common = expected >= 10
    counts = np.append(counts[is_common], counts[~is_common].sum())
    expected = np.append(expected[is_common], expected[~is_common].sum())
    chi_square = ((counts - expected) ** 2 / np.maximum(expected, 1)).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_short_list_sorting_and_whole_vocabulary_draw_the_same(monkeypatch, filters):
    if KERNELS is not None:
        pytest.skip("kernels have one way only")
    logits = torch.randn(8, 9000, generator=torch.Generator().manual_seed(5)).mul(4)
    logits = (logits * 8).round() / 8  # ties, also at the thresholds
    uniforms = np.random.default_rng(2).random(200)
    index = np.arange(200) % 8
    draws = make_draws(logits, uniforms, index=index, **filters)
    usual = draw(draws)
    for num_best, num_best_max in [(64, 1024), (1024, 1024), (128, 0)]:
        monkeypatch.setattr(draw_module, "_NUM_BEST", num_best)
        monkeypatch.setattr(draw_module, "_NUM_BEST_MAX", num_best_max)
        assert draw(draws).tolist() == usual.tolist()


def test_values_that_tie_with_the_last_kept_one_are_kept():
    logits = torch.zeros(1, 5000)
    logits[0, 100] = 2.0
    drawn = draw(make_draws(logits, np.linspace(0.0, 1 - 2**-53, 500), top_k=2))
    assert drawn.min() == 0
    assert drawn.max() == 4999


def test_top_p_counts_all_that_tie_with_the_last_of_top_k():
    # 3 tokens and 4000 equals behind them: a tenth of all that is left is more than the 3.
    logits = torch.zeros(1, 5000)
    logits[0, 100:4100] = 4.0
    logits[0, [7, 8, 4500]] = 5.0
    drawn = draw(make_draws(logits, np.linspace(0.0, 0.999, 300), top_k=50, top_p=0.1))
    kept = {7, 8, 4500, *range(100, 4100)}
    assert set(drawn.tolist()) <= kept
    assert len(set(drawn.tolist())) > 250


def test_the_ends_of_the_unit_interval_stay_inside_the_kept_set():
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [3, 500, 997]] = torch.tensor([1.0, 1.5, 1.0])
    ends = [0.0, 1 - 2**-53]
    for filters in FILTERS[:-1]:
        low, high = draw(make_draws(logits, ends, **filters)).tolist()
        assert {low, high} <= {3, 500, 997}
    assert draw(make_draws(logits, ends)).tolist() == [3, 997]


@pytest.mark.parametrize("vocab_size", [131_071, 131_072, 131_073, 200_003])
def test_flat_distribution_over_a_large_vocabulary_reaches_its_last_token(vocab_size):
    # Totals around 2**57 and beyond, which a float64 rounds up or down.
    logits = torch.zeros(1, vocab_size)
    logits[0, ::3] = -1e-4
    drawn = draw(make_draws(logits, [0.0, 1 - 2**-53]))
    assert drawn.tolist() == [0, vocab_size - 1]


def test_tiny_temperature_takes_the_best_and_huge_one_levels_all():
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 10
    uniforms = np.linspace(0.001, 0.999, 50)
    tiny = draw(make_draws(logits, uniforms, temperature=float(np.finfo(np.float32).tiny)))
    assert set(tiny.tolist()) == {int(logits.argmax())}
    huge = draw(make_draws(logits, uniforms, temperature=1e9))
    assert huge.tolist() == (uniforms * 300).astype(int).tolist()


def test_logits_are_not_changed():
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    for filters in FILTERS:
        draw(make_draws(logits, [0.5] * 4, index=[0, 1, 2, 3], **filters))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_total_weights_are_the_log_sum_exp(temperature):
    logits = torch.randn(9, 2000, generator=torch.Generator().manual_seed(4)) * 5
    draws = make_draws(logits, np.zeros(9), index=np.arange(9), temperature=temperature)
    scaled = logits.double() / temperature
    log_totals = (total_weights(draws).double() / WEIGHT_ONE).log()[:, 0]
    expected = scaled.logsumexp(1) - scaled.amax(1)
    torch.testing.assert_close(log_totals, expected, rtol=0, atol=1e-6)
