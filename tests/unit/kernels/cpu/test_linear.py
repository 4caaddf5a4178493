"""Linear layers against float64, and every row the same bits in whatever company."""

import random

import pytest
import torch

from pageframe.core.errors import InternalError
from pageframe.kernels.cpu.library import CpuLibrary
from pageframe.kernels.cpu.linear import GATE, UP, PackedLinear
from unit.kernels.cpu.libraries import USABLE, loaded

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module", params=USABLE)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    return loaded(request.param)


def packed(library, weight, bias=None):
    layer = PackedLinear(
        library, weight.shape[1], len(weight), dtype=weight.dtype, has_bias=bias is not None
    )
    layer.pack(weight)
    if bias is not None:
        layer.pack_bias(bias)
    return layer


def run(library, layer, x, *, num_threads=1, dtype=torch.float32, add_to=None):
    y = torch.full((len(x), layer.shape.num_out), 7.0, dtype=dtype) if add_to is None else add_to
    pool = library.create_pool(num_threads)
    layer(pool, x, y, add=add_to is not None)
    pool.close()
    return y


def bound(x, weight):
    """What sums of float32 may lose: an ulp of the largest sum on the way, for each addition."""
    largest = x.double().abs() @ weight.double().abs().T
    return largest * (weight.shape[1] + 8) * 2.0**-24 + 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_out", [1, 17, 33, 64])
@pytest.mark.parametrize("num_in", [1, 3, 576, 1537])
def test_a_layer_is_a_matrix_product(library, dtype, num_in, num_out):
    print("seed", 11)
    torch.manual_seed(11)
    weight = torch.randn(num_out, num_in).to(dtype)
    layer = packed(library, weight)
    for num_rows in (0, 1, 2, 3, 5, 13, 121):
        x = torch.randn(num_rows, num_in).to(layer.row_dtype)
        wanted = x.double() @ weight.double().T
        error = (run(library, layer, x).double() - wanted).abs()
        assert (error <= bound(x, weight)).all(), (num_rows, error.max())


def test_many_rows_against_many_outputs(library):
    torch.manual_seed(12)
    weight = torch.randn(960, 576)
    x = torch.randn(300, 576)
    error = (
        run(library, packed(library, weight), x).double() - x.double() @ weight.double().T
    ).abs()
    assert (error <= bound(x, weight)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_whatever_company(library, dtype):
    torch.manual_seed(13)
    layer = packed(library, torch.randn(97, 1029).to(dtype), torch.randn(97))
    x = torch.randn(300, 1029).to(layer.row_dtype)
    alone = torch.cat([run(library, layer, x[row : row + 1]) for row in range(300)])
    for num_rows in (2, 3, 5, 7, 16, 64, 119, 121, 300):
        for num_threads in (1, 2, 3):
            together = run(library, layer, x[:num_rows], num_threads=num_threads)
            same = together.view(torch.int32) == alone[:num_rows].view(torch.int32)
            assert same.all(), (num_rows, num_threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_residual_and_rounding_follow_the_sums(library, dtype):
    torch.manual_seed(14)
    weight, bias = torch.randn(37, 50).to(dtype), torch.randn(37)
    layer = packed(library, weight, bias)
    plain = packed(library, weight)
    x = torch.randn(9, 50).to(layer.row_dtype)
    sums = run(library, plain, x)
    assert torch.equal(run(library, layer, x), sums + bias)
    residual = torch.randn(9, 37)
    assert torch.equal(run(library, layer, x, add_to=residual.clone()), residual + (sums + bias))
    rounded = run(library, layer, x, dtype=torch.bfloat16)
    assert torch.equal(rounded, (sums + bias).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_out", [1, 8, 21, 64])
def test_a_gated_layer_is_silu_of_gate_times_up(library, dtype, num_out):
    torch.manual_seed(15)
    gate, up = torch.randn(2, num_out, 77).to(dtype)
    biases = torch.randn(2, num_out)
    layer = PackedLinear(library, 77, num_out, dtype=dtype, gated=True, has_bias=True)
    for part, weight in ((GATE, gate), (UP, up)):
        layer.pack(weight, part=part)
        layer.pack_bias(biases[part], part=part)
    x = torch.randn(14, 77).to(layer.row_dtype)
    one, other = (
        run(library, packed(library, weight), x) + bias
        for weight, bias in zip((gate, up), biases, strict=True)
    )
    wanted = torch.nn.functional.silu(one.double()) * other.double()
    torch.testing.assert_close(run(library, layer, x).double(), wanted, rtol=2e-6, atol=1e-30)
    residual = torch.randn(14, num_out)
    torch.testing.assert_close(
        run(library, layer, x, add_to=residual.clone()).double(),
        residual.double() + wanted,
        rtol=2e-6,
        atol=1e-6,
    )


def test_matrices_may_be_packed_one_after_another_in_any_order(library):
    torch.manual_seed(16)
    weight = torch.randn(41, 30)
    layer = PackedLinear(library, 30, 41)
    for begin, end in ((20, 41), (0, 3), (3, 20)):
        layer.pack(weight[begin:end], first_out=begin)
    x = torch.randn(4, 30)
    assert torch.equal(run(library, layer, x), run(library, packed(library, weight), x))


def test_weights_of_another_dtype_are_rounded_or_widened(library):
    torch.manual_seed(17)
    weight = torch.randn(20, 9)
    for source, to in ((weight, torch.bfloat16), (weight.bfloat16(), torch.float32)):
        layer = PackedLinear(library, 9, 20, dtype=to)
        layer.pack(source)
        x = torch.randn(3, 9).to(layer.row_dtype)
        assert torch.equal(run(library, layer, x), run(library, packed(library, source.to(to)), x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_stay_in_their_row_and_output(library, dtype):
    weight = torch.ones(19, 6).to(dtype)
    weight[18] = float("nan")
    layer = packed(library, weight)
    x = torch.ones(8, 6).to(layer.row_dtype)
    x[3, 5] = float("inf")
    x[4, 0], x[4, 1] = float("inf"), float("-inf")
    x[5, 2] = float("nan")
    y = run(library, layer, x)
    assert y[:, 18].isnan().all()
    assert (y[3, :18] == float("inf")).all()
    assert y[4:6, :18].isnan().all()
    assert (y[[0, 1, 2, 6, 7], :18] == 6.0).all()


def test_rows_may_lie_apart_and_nothing_between_them_is_touched(library):
    torch.manual_seed(18)
    weight = torch.randn(21, 10)
    layer = packed(library, weight)
    wide_x, wide_y = torch.full((7, 13), float("nan")), torch.full((7, 26), 5.0)
    wide_x[:, 1:11] = torch.randn(7, 10)
    x, y = wide_x[:, 1:11], wide_y[:, 2:23]
    pool = library.create_pool(2)
    layer(pool, x, y)
    assert torch.equal(y, run(library, layer, x.contiguous()))
    assert (wide_y[:, :2] == 5.0).all()
    assert (wide_y[:, 23:] == 5.0).all()


def test_what_cannot_be_is_refused(library):
    layer = packed(library, torch.zeros(4, 6))
    pool = library.create_pool(1)
    x, y = torch.zeros(2, 6), torch.zeros(2, 4)
    refused = [
        (x.T.contiguous().T, y),  # channels of a row lie apart
        (torch.zeros(2, 5), y),
        (x, torch.zeros(2, 3)),
        (x.bfloat16(), y),  # float32 weights take float32 rows
        (x.expand(2, 6)[:1].expand(2, 6), y),  # a stride of 0
    ]
    for bad_x, bad_y in refused:
        with pytest.raises(InternalError, match="KERNEL_ARGUMENT"):
            layer(pool, bad_x, bad_y)
    with pytest.raises(InternalError, match="KERNEL_ARGUMENT"):
        layer(pool, x, y.bfloat16(), add=True)
    with pytest.raises(InternalError, match="KERNEL_ARGUMENT"):
        layer.pack(torch.zeros(4, 6), first_out=1)
    with pytest.raises(InternalError, match="KERNEL_ARGUMENT"):
        layer.pack(torch.zeros(4, 6), part=UP)
    with pytest.raises(InternalError, match="KERNEL_ARGUMENT"):
        layer.pack_bias(torch.zeros(4))
    with pytest.raises(InternalError, match="KERNEL_ARGUMENT"):
        PackedLinear(library, 0, 4)


def test_random_shapes_agree_with_float64(library):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(30):
        num_in, num_out = rng.randrange(1, 700), rng.randrange(1, 200)
        dtype = rng.choice(DTYPES)
        weight = torch.randn(num_out, num_in).to(dtype)
        layer = packed(library, weight)
        x = torch.randn(rng.choice((1, 2, 4, 6, 11, 30)), num_in).to(layer.row_dtype)
        y = run(library, layer, x, num_threads=rng.choice((1, 2)))
        error = (y.double() - x.double() @ weight.double().T).abs()
        assert (error <= bound(x, weight)).all(), (num_in, num_out, dtype)
