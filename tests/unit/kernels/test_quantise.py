"""Quantising: the nearest number the type has, and a scale that is safe for every row."""

import pytest
import torch

from pageframe.kernels.ops.quantise import STORED_MAX, as_bytes, check_scales, quantise
from pageframe.kernels.reference.quantise import quantise as quantise_plainly
from unit.kernels.pools import QUANTISED

_DTYPES = pytest.mark.parametrize("dtype", QUANTISED)


def _back(stored, scales):
    return stored.double() * scales.double()[..., None]


def _assert_equals_reference(rows, dtype):
    stored, scales = quantise(rows, dtype)
    expected, expected_scales = quantise_plainly(rows, dtype)
    assert torch.equal(scales, expected_scales)
    # Minus zero is zero, and the only number of which the reference knows one form.
    assert torch.equal(stored.float() + 0.0, expected.float() + 0.0)
    assert (stored.dtype, scales.dtype) == (dtype, torch.float32)


@_DTYPES
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 8), (5, 2, 1), (2, 3, 2, 7)])
def test_equals_reference(dtype, source, shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(source)
    _assert_equals_reference(rows, dtype)


@_DTYPES
def test_equals_reference_over_all_magnitudes(dtype):
    generator = torch.Generator().manual_seed(4)
    spread = torch.randn(60, 6, generator=generator) * 10.0 ** torch.linspace(-44, 38, 60)[:, None]
    # A row of one large number and many small ones, too.
    spread[:, 0] *= 100
    _assert_equals_reference(spread[spread.isfinite().all(-1)], dtype)


@_DTYPES
def test_ties_go_to_the_even_number(dtype):
    largest = STORED_MAX[dtype]
    # The scale is one, so these are quotients.
    ties = {
        torch.int8: ([0.5, 1.5, -2.5, 126.5], [0, 2, -2, 126]),
        torch.float8_e4m3fn: ([17, 19, -2.125, 2**-10], [16, 20, -2, 0]),
    }
    row, expected = ties[dtype]
    stored, scales = quantise(torch.tensor([[largest, *row]]), dtype)
    assert scales.tolist() == [1.0]
    assert stored.float().tolist() == [[largest, *expected]]


@_DTYPES
def test_largest_number_of_a_row_comes_back_and_others_within_half_a_step(dtype):
    seed = int(torch.randint(2**31, ()).item())
    print(f"seed={seed}")
    rows = torch.randn(500, 64, generator=torch.Generator().manual_seed(seed))
    stored, scales = quantise(rows, dtype)
    error = (_back(stored, scales) - rows.double()).abs()
    half_step = scales.double()[:, None] * 0.5
    if dtype == torch.float8_e4m3fn:
        # Three fraction bits: 1/16 of a number; near zero half of the smallest, 2 ** -9.
        half_step = torch.maximum(rows.double().abs() / 16, half_step * 2**-9)
    assert (error <= half_step * (1 + 1e-5)).all()
    largest = rows.abs().argmax(-1, keepdim=True)
    assert (error.gather(1, largest) <= 1e-6 * rows.double().abs().gather(1, largest)).all()


@_DTYPES
def test_rows_of_zeros_come_back_as_zeros(dtype):
    stored, scales = quantise(torch.zeros(2, 3, 4), dtype)
    assert scales.isfinite().all()
    assert torch.equal(_back(stored, scales), torch.zeros(2, 3, 4, dtype=torch.float64))


@_DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_spoils_its_own_row_only(dtype, bad):
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))
    stored, scales = quantise(rows, dtype)
    rows[2, 5] = bad
    spoilt, spoilt_scales = quantise(rows, dtype)
    assert not _back(spoilt, spoilt_scales)[2].isfinite().any()
    rest = [0, 1, 3]
    assert torch.equal(as_bytes(spoilt)[rest], as_bytes(stored)[rest])
    assert torch.equal(spoilt_scales[rest], scales[rest])


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"torch\.float16 is no quantised type; torch\.int8"):
        quantise(torch.zeros(1, 2), torch.float16)


def test_scales_must_be_there_exactly_if_needed():
    with pytest.raises(ValueError, match=r"no scales for numbers of torch\.int8"):
        check_scales(torch.zeros(2, 3, dtype=torch.int8), None)
    with pytest.raises(ValueError, match=r"scales for numbers of torch\.float32"):
        check_scales(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"scales \(3,\) do not fit \(2, 3\)"):
        check_scales(torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3))
