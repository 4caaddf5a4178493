"""Layers packed on several threads, and what becomes of those that cannot be."""

import pytest
import torch

from pageframe.executor.model.packing import PackingThreads, Part
from pageframe.kernels.cpu import library
from pageframe.kernels.cpu.linear import PackedLinear

NUM_IN = 8
HAVE = library.choose().library

pytestmark = pytest.mark.skipif(HAVE is None, reason="no compiled kernels")


def _linear(num_out: int, *, has_bias: bool = False) -> PackedLinear:
    return PackedLinear(HAVE, NUM_IN, num_out, has_bias=has_bias)


def _outputs(linear: PackedLinear, num_out: int) -> torch.Tensor:
    y = torch.empty(1, num_out)
    linear(HAVE.create_pool(1), torch.ones(1, NUM_IN), y)
    return y[0]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_all_layers_are_packed_behind_the_block(num_threads):
    linears = [_linear(5) for _ in range(20)]
    with PackingThreads(num_threads) as threads:
        for index, linear in enumerate(linears):
            threads.pack(linear, [Part(torch.full((5, NUM_IN), float(index)))])
    for index, linear in enumerate(linears):
        assert _outputs(linear, 5).tolist() == [8.0 * index] * 5


def test_parts_of_a_layer_lie_below_one_another_with_their_biases():
    linear = _linear(3, has_bias=True)
    with PackingThreads(2) as threads:
        first = Part(torch.ones(2, NUM_IN), torch.tensor([0.5, 1.0]))
        second = Part(torch.full((1, NUM_IN), 2.0), torch.tensor([3.0]), first_out=2)
        threads.pack(linear, [first, second])
    assert _outputs(linear, 3).tolist() == [8.5, 9.0, 19.0]


def _pack_one_that_does_not_fit(num_behind: int, error_behind: Exception | None = None) -> None:
    with PackingThreads(2) as threads:
        threads.pack(_linear(5), [Part(torch.ones(5, NUM_IN + 1))])
        for _ in range(num_behind):
            threads.pack(_linear(5), [Part(torch.ones(5, NUM_IN))])
        if error_behind is not None:
            raise error_behind


@pytest.mark.parametrize("num_behind", [0, 10])
def test_a_layer_that_cannot_be_packed_is_an_error_however_many_follow(num_behind):
    with pytest.raises(AssertionError, match="9 inputs"):
        _pack_one_that_does_not_fit(num_behind)


def test_an_error_of_the_reader_is_the_one_that_is_told():
    with pytest.raises(KeyError, match="missing"):
        _pack_one_that_does_not_fit(1, KeyError("missing"))
