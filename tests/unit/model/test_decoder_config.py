"""The native runner reads configs as transformers does, and leaves alone what it cannot serve."""

import json

import pytest
import torch
import transformers

from pageframe.core.errors import InvalidRequestError, UnimplementedError
from pageframe.executor.model.decoder_config import (
    NATIVE_MODEL_TYPES,
    Activation,
    Family,
    NormKind,
    parse_decoder_config,
)
from pageframe.executor.model.rope import RotaryAngles, inverse_frequencies

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("model_type", sorted({*NATIVE_MODEL_TYPES} - {"falcon"}))
def test_defaults_of_missing_keys_equal_those_of_transformers(model_type, tmp_path):
    minimal = {**_SIZES, "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(minimal))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = parse_decoder_config(minimal)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 4)
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.max_model_len == theirs.max_position_embeddings
    assert ours.is_tied == theirs.tie_word_embeddings
    assert ours.rope_type == theirs.rope_parameters["rope_type"]
    assert ours.rope_parameters["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert ours.windows[0] == getattr(theirs, "sliding_window", None)


_FALCON = {"model_type": "falcon", **{k: v for k, v in _SIZES.items() if k != "intermediate_size"}}


@pytest.mark.parametrize(
    ("keys", "num_kv_heads", "is_parallel", "has_feed_forward_norm"),
    [
        ({}, 1, True, False),
        ({"multi_query": False}, 4, True, False),
        ({"parallel_attn": False}, 1, False, True),
        ({"alibi": True, "multi_query": False, "parallel_attn": False}, 4, False, True),
        ({"new_decoder_architecture": True}, 4, True, True),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2, True, True),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}, 4, True, False),
        # The new design is always parallel, and knows no single head of keys.
        ({"new_decoder_architecture": True, "parallel_attn": False}, 4, True, True),
        ({"num_kv_heads": 2}, 1, True, False),
    ],
)
def test_falcons_designs(keys, num_kv_heads, is_parallel, has_feed_forward_norm, tmp_path):
    config = {**_FALCON, **keys}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = parse_decoder_config(config)
    assert (ours.family, ours.norm, ours.activation) == (
        Family.FALCON,
        NormKind.CENTRED,
        Activation.GELU,
    )
    assert ours.num_kv_heads == num_kv_heads
    assert (ours.is_parallel, ours.has_feed_forward_norm) == (is_parallel, has_feed_forward_norm)
    assert ours.has_alibi == theirs.alibi
    assert ours.head_dim == theirs.head_dim
    assert ours.intermediate_size == theirs.ffn_hidden_size
    assert ours.norm_epsilon == theirs.layer_norm_epsilon
    assert ours.max_model_len == theirs.max_position_embeddings
    assert ours.is_tied == theirs.tie_word_embeddings
    assert ours.rope_parameters["rope_theta"] == theirs.rope_parameters["rope_theta"]


def test_falcons_that_cannot_be_are_refused():
    with pytest.raises(UnimplementedError, match="'relu' is not 'gelu'"):
        parse_decoder_config({**_FALCON, "activation": "relu"})
    with pytest.raises(InvalidRequestError, match="5 heads cannot share"):
        parse_decoder_config({**_FALCON, "num_attention_heads": 5})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {**_LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": _LLAMA3},
        {"rope_theta": 1e6},
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 250.0}},
    ],
)
def test_angles_equal_those_of_transformers_bit_by_bit(rope, tmp_path):
    config = {**_SIZES, "model_type": "llama", "max_position_embeddings": 512, **rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(loaded)
    ours = parse_decoder_config(config)
    frequencies = inverse_frequencies(ours.head_dim, ours.rope_type, ours.rope_parameters)
    assert torch.equal(frequencies, theirs.inv_freq)
    positions = torch.tensor([0, 1, 17, 300, 511])
    cosines, sines = theirs(torch.zeros(1), positions[None])
    angles = RotaryAngles(positions, frequencies, torch.float32)
    assert torch.equal(angles.cosines[:, 0], cosines[0])
    assert torch.equal(angles.sines[:, 0], sines[0, :, : ours.head_dim // 2])


def test_rotation_equals_the_complex_product():
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(3, 2, 8, generator=generator)
    positions = torch.tensor([0, 5, 90])
    frequencies = inverse_frequencies(8, "default", {"rope_theta": 100.0})
    rotated = RotaryAngles(positions, frequencies, torch.float32).rotate(
        heads, torch.empty_like(heads)
    )
    turned = torch.complex(heads[..., :4], heads[..., 4:]) * torch.polar(
        torch.ones(3, 1, 4), positions[:, None, None] * frequencies
    )
    torch.testing.assert_close(rotated, torch.cat((turned.real, turned.imag), -1))


def test_sliding_layers_of_qwen_are_the_upper_ones():
    config = {
        **_SIZES,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    }
    assert parse_decoder_config(config).windows == (None, 7)
    assert parse_decoder_config({**config, "use_sliding_window": False}).windows == (None, None)
    named = {**config, "layer_types": ["sliding_attention", "full_attention"]}
    assert parse_decoder_config(named).windows == (7, None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "gpt2"}, "model type 'gpt2'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "layers differ",
        ),
    ],
)
def test_leaves_to_other_runners_what_it_cannot_compute(change, why):
    with pytest.raises(UnimplementedError, match=why) as caught:
        parse_decoder_config({**_SIZES, "model_type": "llama", **change})
    assert caught.value.reason == "MODEL_NOT_NATIVE"


@pytest.mark.parametrize("value", [None, 0, -1, "many"])
def test_refuses_sizes_without_sense(value):
    with pytest.raises(InvalidRequestError, match="num_hidden_layers") as caught:
        parse_decoder_config({**_SIZES, "model_type": "llama", "num_hidden_layers": value})
    assert caught.value.reason == "MODEL_CONFIG_INVALID"
