"""Biases of keys: as Hugging Face rounds them, and the same however they are asked for."""

import math

import pytest
import torch
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from pageframe.executor.model.native_parts import alibi_slopes
from pageframe.kernels.ops.alibi import Alibi


@pytest.mark.parametrize("num_heads", [1, 2, 6, 8, 12, 32, 71])
def test_biases_equal_those_of_transformers_bit_by_bit(num_heads):
    num_keys, head_dim = 700, 12
    theirs = build_alibi_tensor(
        torch.ones(1, num_keys, dtype=torch.int64), num_heads, torch.float32
    )
    alibi = Alibi(alibi_slopes(num_heads).bfloat16(), 0.5)
    assert torch.equal(alibi.key_bias(num_keys), theirs[:, 0] * 0.5)
    # The scale of real heads is no power of two: dividing and multiplying round differently.
    alibi = Alibi(alibi_slopes(num_heads).bfloat16(), head_dim**-0.5)
    torch.testing.assert_close(
        alibi.key_bias(num_keys), theirs[:, 0] / math.sqrt(head_dim), rtol=2e-7, atol=0
    )


def test_asking_for_more_keys_changes_no_bias():
    alibi = Alibi(torch.tensor([0.3, 0.7]))
    few = alibi.key_bias(3).clone()
    assert torch.equal(few, torch.tensor([[0.0, 0.3, 0.6], [0.0, 0.7, 1.4]]))
    many = alibi.key_bias(5000)
    assert many.shape == (2, 5000)
    assert torch.equal(many[:, :3], few)
    assert alibi.key_bias(2048).data_ptr() == many.data_ptr(), "computed once"


def test_what_kernels_make_of_slopes_is_scaled_and_not_rounded():
    slopes = torch.tensor([0.3, 0.7]).bfloat16()
    assert torch.equal(Alibi(slopes, 0.1).slopes, slopes.float() * 0.1)
