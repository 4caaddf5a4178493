"""Residual addition and RMSNorm in one pass are the two formulas, each rounded once."""

import pytest
import torch

from pageframe.kernels.ops.residual_norm import SIZE_MAX, residual_norm
from pageframe.kernels.reference.residual_norm import residual_norm as residual_norm_plainly
from unit.kernels.triton.tolerances import FLOATS, assert_rounds_to

_EPSILON = 1e-5


def _random(dtype, num_rows, size):
    generator = torch.Generator().manual_seed(size)
    hidden = torch.randn(num_rows, size, generator=generator) * 3
    delta = torch.randn(num_rows, size, generator=generator)
    weight = torch.rand(size, generator=generator) + 0.5
    return hidden.to(dtype), delta.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("num_rows", "size"), [(1, 1), (3, 40), (2, 576), (2, 4096), (1, 5120)])
@pytest.mark.parametrize("has_delta", [True, False])
def test_equals_the_formulas(device, dtype, num_rows, size, has_delta):
    hidden, delta, weight = _random(dtype, num_rows, size)
    delta = delta if has_delta else None
    ours = hidden.to(device, copy=True)
    out = residual_norm(
        ours,
        None if delta is None else delta.to(device),
        weight.to(device),
        _EPSILON,
        torch.full_like(ours, torch.nan),
    )
    summed, _ = residual_norm_plainly(hidden, delta, weight, _EPSILON)
    assert_rounds_to(ours, summed.double())
    # Of the sum as it was rounded: that is what the next layer sees.
    _, exact = residual_norm_plainly(ours.cpu(), None, weight, _EPSILON)
    assert_rounds_to(out, exact)


def test_the_result_may_take_the_place_of_what_was_added(device):
    hidden, delta, weight = (part.to(device) for part in _random(torch.float32, 3, 48))
    summed, exact = residual_norm_plainly(hidden, delta, weight, _EPSILON)
    assert residual_norm(hidden, delta, weight, _EPSILON, delta) is delta
    assert_rounds_to(delta, exact)
    assert torch.equal(hidden, summed)


def test_a_row_of_zeros_stays_zero(device):
    zeros = torch.zeros(2, 16, device=device)
    weight = torch.ones(16, device=device)
    assert not residual_norm(zeros, None, weight, _EPSILON, torch.ones_like(zeros)).any()


def test_rows_may_lie_apart(device):
    hidden, delta, weight = (part.to(device) for part in _random(torch.float32, 3, 48))
    wide = torch.full((3, 64), 7.0, device=device)
    wide[:, :48] = hidden
    summed, exact = residual_norm_plainly(hidden, delta, weight, _EPSILON)
    out = residual_norm(wide[:, :48], delta, weight, _EPSILON, torch.empty_like(delta))
    assert_rounds_to(out, exact)
    assert torch.equal(wide[:, :48], summed)
    assert (wide[:, 48:] == 7.0).all()


def test_shapes_that_do_not_fit_are_refused():
    rows, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(ValueError, match="shapes"):
        residual_norm(rows, rows[:1], weight, _EPSILON, rows)
    with pytest.raises(ValueError, match="shapes"):
        residual_norm(rows, rows, weight[:4], _EPSILON, rows)
    wide = torch.zeros(1, SIZE_MAX + 1)
    with pytest.raises(ValueError, match="at most"):
        residual_norm(wide, None, wide[0], _EPSILON, wide)
