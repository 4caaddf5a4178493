"""SwiGLU in one pass is the formula, rounded once."""

import pytest
import torch

from pageframe.kernels.ops.swiglu import swiglu
from pageframe.kernels.reference.swiglu import swiglu as swiglu_plainly
from unit.kernels.triton.tolerances import FLOATS, assert_rounds_to


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("num_rows", "num_channels"), [(1, 1), (3, 40), (2, 1024), (2, 1536)])
def test_equals_the_formula(device, dtype, num_rows, num_channels):
    generator = torch.Generator().manual_seed(num_channels)
    gate_up = (torch.randn(num_rows, 2 * num_channels, generator=generator) * 4).to(dtype)
    out = torch.full((num_rows, num_channels), torch.nan, dtype=dtype, device=device)
    assert_rounds_to(swiglu(gate_up.to(device), out), swiglu_plainly(gate_up))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_large_gates_neither_overflow_nor_lose_their_sign(device):
    gate_up = torch.tensor([[300.0, -300.0, 0.0, 2.0, 3.0, 5.0]], device=device)
    out = swiglu(gate_up, torch.empty(1, 3, device=device))
    assert out.tolist() == [[600.0, 0.0, 0.0]]


def test_rows_may_lie_apart(device):
    memory = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).to(device)
    wide = torch.full((3, 50), 7.0, device=device)
    swiglu(memory[:, :60], wide[:, :30])
    assert_rounds_to(wide[:, :30], swiglu_plainly(memory[:, :60]))
    assert (wide[:, 30:] == 7.0).all()


def test_no_rows_are_no_work(device):
    assert swiglu(torch.zeros(0, 8, device=device), torch.zeros(0, 4, device=device)).shape == (
        0,
        4,
    )


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        swiglu(torch.zeros(2, 8), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="contiguous"):
        swiglu(torch.zeros(8, 2).t(), torch.zeros(2, 4))
