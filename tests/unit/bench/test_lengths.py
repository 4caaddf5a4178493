import numpy as np
import pytest

from bench.paper.lengths import MAX_MODEL_LEN, alpaca_like, like_paper, sharegpt, tilt
from bench.paper.workload import backlog, poisson
from pageframe.core.errors import PreconditionError
from unit.bench.bench_house import make_lengths


def test_sharegpt_is_real_and_fits_the_model():
    lengths = sharegpt()
    assert len(lengths) == 16_851
    total = lengths.num_prompt_tokens + lengths.num_output_tokens
    assert total.max() <= MAX_MODEL_LEN
    assert lengths.num_prompt_tokens.min() == lengths.num_output_tokens.min() == 1


def test_weights_give_the_means_that_are_asked_for():
    lengths = make_lengths((1, 10), (5, 5), (9, 40), (30, 2))
    weights = tilt(lengths, 12.0, 15.0)
    assert weights.min() > 0
    assert weights.sum() == pytest.approx(1)
    assert weights @ lengths.num_prompt_tokens == pytest.approx(12)
    assert weights @ lengths.num_output_tokens == pytest.approx(15)


def test_weights_are_equal_when_the_means_are_right_already():
    lengths = make_lengths((1, 10), (5, 5), (9, 40), (30, 2))
    means = lengths.num_prompt_tokens.mean(), lengths.num_output_tokens.mean()
    assert tilt(lengths, *means) == pytest.approx([0.25] * 4)


def test_means_that_no_weights_give_are_refused():
    with pytest.raises(PreconditionError) as caught:
        tilt(make_lengths((1, 10), (5, 5), (9, 40)), 100.0, 15.0)
    assert caught.value.reason == "MEANS_OUT_OF_REACH"


def test_matched_lengths_are_real_exchanges_with_the_means_of_the_paper():
    plain = sharegpt()
    matched = like_paper(plain, seed=5)
    assert len(matched) == len(plain)
    assert matched.num_prompt_tokens.mean() == pytest.approx(161.31, rel=0.01)
    assert matched.num_output_tokens.mean() == pytest.approx(337.99, rel=0.01)
    pairs = zip(plain.num_prompt_tokens.tolist(), plain.num_output_tokens.tolist(), strict=True)
    real = set(pairs)
    drawn = zip(matched.num_prompt_tokens.tolist(), matched.num_output_tokens.tolist(), strict=True)
    assert set(drawn) <= real


def test_synthetic_lengths_have_the_means_of_alpaca():
    lengths = alpaca_like(20_000, seed=1)
    assert lengths.num_prompt_tokens.mean() == pytest.approx(19.31, rel=0.03)
    assert lengths.num_output_tokens.mean() == pytest.approx(58.45, rel=0.03)
    assert lengths.num_prompt_tokens.min() >= 1
    assert lengths.num_output_tokens.min() >= 1


def test_a_sample_takes_nobody_twice_before_everybody_was_taken():
    lengths = make_lengths(*((index, 1) for index in range(1, 6)))
    drawn = lengths.sample(12, np.random.default_rng(0)).num_prompt_tokens.tolist()
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [1, 2, 3, 4, 5]
    assert len(drawn) == 12


def test_another_rate_has_the_same_requests_with_shorter_gaps():
    lengths = sharegpt()
    slow = poisson(lengths, rate_per_s=1, duration_s=50, seed=3)
    fast = poisson(lengths, rate_per_s=2, duration_s=50, seed=3)
    assert len(slow) == 50
    assert len(fast) == 100
    np.testing.assert_allclose(fast.arrival_ns[:50] * 2, slow.arrival_ns, atol=2)
    prompts = slow.lengths.num_prompt_tokens
    assert prompts.tolist() == fast.lengths.num_prompt_tokens[:50].tolist()


def test_a_backlog_is_there_from_the_start():
    workload = backlog(sharegpt(), num_requests=4, seed=3)
    assert workload.arrival_ns.tolist() == [0, 0, 0, 0]


def test_an_even_sample_misses_the_means_by_less():
    lengths = sharegpt()
    product = lengths.num_prompt_tokens.astype(float) * lengths.num_output_tokens
    errors = {"sample": [], "spread": []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for name, drawn in (
            ("sample", lengths.sample(200, rng)),
            ("spread", lengths.spread(200, rng)),
        ):
            products = drawn.num_prompt_tokens.astype(float) * drawn.num_output_tokens
            errors[name].append(abs(products.mean() / product.mean() - 1))
    assert np.mean(errors["spread"]) < np.mean(errors["sample"]) / 3


def test_an_even_sample_of_all_is_all():
    lengths = make_lengths((3, 1), (1, 9), (2, 4), (1, 2))
    drawn = lengths.spread(4, np.random.default_rng(0))
    pairs = zip(drawn.num_prompt_tokens.tolist(), drawn.num_output_tokens.tolist(), strict=True)
    assert sorted(pairs) == [(1, 2), (1, 9), (2, 4), (3, 1)]
