"""Tokens chosen on the device are those of the PyTorch sampler, filter by filter."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from pageframe.executor.model import philox
from pageframe.executor.model.draw import Draws, draw
from pageframe.executor.model.selection import best_token
from pageframe.kernels.ops.choose_token import choose_token

_TILE = 256


@dataclass
class Rows:
    """Parameters of rows; all equal unless a test says otherwise."""

    logits: torch.Tensor
    temperature: list[float] = field(default_factory=lambda: [1.0])
    top_k: list[int] = field(default_factory=lambda: [0])
    top_p: list[float] = field(default_factory=lambda: [1.0])
    min_p: list[float] = field(default_factory=lambda: [0.0])
    seed: int = 11
    position: int = 5

    def column(self, values, dtype):
        """One value per row."""
        num_rows = len(self.logits)
        return np.resize(np.array(values, dtype), num_rows)

    @property
    def top_ks(self):
        vocab_size = self.logits.shape[1]
        return self.column([k or vocab_size for k in self.top_k], np.int64)

    @property
    def seeds(self):
        return (np.arange(len(self.logits)) * 2**60 + self.seed).astype(np.uint64)

    @property
    def sample_indices(self):
        return np.arange(len(self.logits)) % 3

    @property
    def positions(self):
        return np.arange(len(self.logits)) + self.position


def _on_device(rows, device, tile=_TILE):
    tokens = torch.full((len(rows.logits),), -7, dtype=torch.int32, device=device)

    def column(values):
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    choose_token(
        rows.logits.to(device),
        tokens,
        temperatures=column(rows.column(rows.temperature, np.float32)),
        top_ks=column(rows.top_ks.astype(np.int32)),
        top_ps=column(rows.column(rows.top_p, np.float64)),
        min_ps=column(rows.column(rows.min_p, np.float32)),
        seeds=column(rows.seeds.view(np.int64)),
        sample_indices=column(rows.sample_indices),
        positions=column(rows.positions),
        tile=tile,
    )
    return tokens.tolist()


def _by_sampler(rows):
    maxima, _ = best_token(rows.logits)
    draws = Draws(
        logits=rows.logits,
        maxima=maxima,
        index=np.arange(len(rows.logits)),
        temperature=rows.column(rows.temperature, np.float32),
        top_k=rows.top_ks,
        top_p=rows.column(rows.top_p, np.float64),
        min_p=rows.column(rows.min_p, np.float32),
        uniforms=philox.uniform(rows.seeds, rows.sample_indices, rows.positions),
    )
    return draw(draws).tolist()


def _random(num_rows, vocab_size, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


@pytest.mark.parametrize("vocab_size", [1, 15, 256, 257, 700])
def test_temperature_zero_takes_the_best_token_and_the_lowest_of_equals(device, vocab_size):
    logits = _random(4, vocab_size, vocab_size)
    logits[1] = 2.0
    logits[2, vocab_size // 2 :] = 50.0
    rows = Rows(logits, temperature=[0.0])
    expected = best_token(logits)[1].tolist()
    assert expected[1] == 0
    assert _on_device(rows, device) == expected


def test_zeros_of_both_signs_are_equals(device):
    rows = Rows(torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]]), temperature=[0.0])
    assert _on_device(rows, device) == [1, 1]


@pytest.mark.parametrize("vocab_size", [1, 17, 256, 600])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
def test_draws_without_filters_are_the_samplers(device, vocab_size, temperature):
    rows = Rows(_random(4, vocab_size, vocab_size), temperature=[temperature])
    assert _on_device(rows, device) == _by_sampler(rows)


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": [1, 2, 5, 299, 300]},
        {"top_p": [0.01, 0.5, 0.9, 0.999]},
        {"min_p": [0.001, 0.1, 0.9, 1.0]},
        {"top_k": [3, 40], "top_p": [0.3, 0.8, 0.95]},
        {"top_k": [7], "top_p": [0.9], "min_p": [0.05, 0.3], "temperature": [0.7, 1.5]},
        # Rows with and without, side by side; and greedy ones among them.
        {"top_k": [0, 4, 0], "top_p": [1.0, 1.0, 0.7, 0.4], "temperature": [1.0, 0.0, 0.8]},
    ],
    ids=lambda filters: "-".join(filters),
)
def test_filtered_draws_are_the_samplers(device, filters):
    rows = Rows(_random(5, 300, 7), **filters)
    tokens, expected = _on_device(rows, device), _by_sampler_or_best(rows)
    assert tokens == expected


def _by_sampler_or_best(rows):
    is_greedy = rows.column(rows.temperature, np.float32) == 0.0
    best = best_token(rows.logits)[1].tolist()
    rows.temperature = np.where(is_greedy, 1.0, rows.column(rows.temperature, np.float32)).tolist()
    drawn = _by_sampler(rows)
    return [best[row] if is_greedy[row] else drawn[row] for row in range(len(best))]


def test_random_draws_are_the_samplers(device):
    seed = int(torch.randint(2**31, ()).item())
    print(f"seed={seed}")
    numbers = np.random.default_rng(seed)
    for _ in range(2):
        num_rows, vocab_size = 4, int(numbers.integers(2, 500))
        rows = Rows(
            _random(num_rows, vocab_size, seed, scale=float(numbers.uniform(0.1, 8))),
            temperature=numbers.uniform(0.1, 2, num_rows).tolist(),
            top_k=numbers.integers(0, vocab_size + 1, num_rows).tolist(),
            top_p=numbers.uniform(0.05, 1, num_rows).tolist(),
            min_p=(numbers.uniform(0, 0.3, num_rows) * numbers.integers(0, 2, num_rows)).tolist(),
            seed=int(numbers.integers(2**62)),
            position=int(numbers.integers(2**31)),
        )
        assert _on_device(rows, device) == _by_sampler(rows)


@pytest.mark.parametrize("filters", [{"top_k": [2]}, {"top_p": [0.5]}])
def test_values_that_tie_are_kept_or_dropped_together(device, filters):
    """Three best of five: a top-k of two keeps all three, and so does half of the weight."""
    logits = torch.tensor([[0.0, 4.0, 4.0, -1.0, 4.0]]).expand(12, 5).contiguous()
    rows = Rows(logits, **filters)
    tokens = _on_device(rows, device)
    assert tokens == _by_sampler(rows)
    assert set(tokens) == {1, 2, 4}


def test_impossible_tokens_are_never_drawn(device):
    logits = torch.full((8, 300), -torch.inf)
    logits[:, [3, 299]] = torch.tensor([1.0, 1.5])
    # Top-k reaches past what is possible.
    rows = Rows(logits, top_k=[0, 50], top_p=[1.0, 0.99])
    tokens = _on_device(rows, device)
    assert tokens == _by_sampler(rows)
    assert set(tokens) == {3, 299}


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_token(device, bad, temperature):
    logits = _random(2, 40, 3)
    logits[0, 17] = bad
    tokens = _on_device(Rows(logits, temperature=[temperature]), device)
    assert tokens[0] == -1
    assert tokens[1] >= 0


def test_a_row_in_which_nothing_is_possible_has_no_token(device):
    assert _on_device(Rows(torch.full((1, 9), -torch.inf)), device) == [-1]


def test_a_token_does_not_depend_on_the_size_of_tiles(device):
    rows = Rows(_random(2, 300, 9), top_k=[20], top_p=[0.9])
    assert _on_device(rows, device, tile=64) == _on_device(rows, device, tile=512)


def test_parameters_of_other_types_are_refused():
    ones = torch.ones(2)
    columns = dict.fromkeys(
        ("temperatures", "top_ks", "top_ps", "min_ps", "seeds", "sample_indices", "positions"),
        ones,
    )
    with pytest.raises(ValueError, match=r"torch.int32 per row"):
        choose_token(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32), **columns)
    with pytest.raises(ValueError, match=r"torch.int32 per row"):
        choose_token(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int32), **columns)
