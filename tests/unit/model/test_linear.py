"""Packed and plain linear layers agree, and the plain one works where packing does not."""

import pytest
import torch

from pageframe.executor.model import linear as linear_module
from pageframe.executor.model.linear import Linear, can_pack
from pageframe.kernels.scratch import Scratch

_CPU = torch.device("cpu")


def _layer(dtype, has_bias):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(33, 20, generator=generator).to(dtype)
    bias = torch.randn(33, generator=generator).to(dtype) if has_bias else None
    return weight, bias, Linear(weight, bias, Scratch(dtype, _CPU), "out")


@pytest.mark.parametrize("is_packable", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 16, 40])
def test_equals_the_product(monkeypatch, is_packable, has_bias, num_rows):
    monkeypatch.setattr(linear_module, "can_pack", lambda dtype: is_packable and can_pack(dtype))
    weight, bias, layer = _layer(torch.float32, has_bias)
    rows = torch.randn(num_rows, 20)
    with torch.inference_mode():
        result = layer(rows)
    torch.testing.assert_close(result, torch.nn.functional.linear(rows, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding(dtype):
    weight, bias, layer = _layer(dtype, has_bias=True)
    rows = torch.randn(5, 20).to(dtype)
    exact = torch.nn.functional.linear(rows.double(), weight.double(), bias.double())
    torch.testing.assert_close(layer(rows).double(), exact, atol=0.1, rtol=2e-2)


def test_machines_without_the_packing_operations_are_told_apart(monkeypatch):
    def refuse(weight):
        raise RuntimeError("no such instructions here")

    monkeypatch.setattr(linear_module, "_pack", refuse)
    can_pack.cache_clear()
    assert not can_pack(torch.float32)
    can_pack.cache_clear()
