"""The fused decoder computes what the PyTorch one does, and each token the same in any cut."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pageframe.core.errors import InternalError, PreconditionError
from pageframe.core.sampling import SamplingParams
from pageframe.executor.batch import StepBatch
from pageframe.executor.model.decoder_config import parse_decoder_config
from pageframe.executor.model.fused import FusedDecoder, why_not
from pageframe.executor.model.loader import load_runner
from pageframe.kernels.cpu import library
from pageframe.kernels.cpu.draw import CpuDraw
from pageframe.kernels.cpu.model import PHASES

_VOCABULARY, _HIDDEN, _INTERMEDIATE, _LAYERS, _HEADS, _KV_HEADS, _DIM = 67, 24, 40, 2, 6, 2, 8
_NUM_TOKENS = 75
_BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": _VOCABULARY,
    "hidden_size": _HIDDEN,
    "intermediate_size": _INTERMEDIATE,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _DIM,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
_FAMILIES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "window": {"model_type": "mistral", "sliding_window": 20},
    "mixed windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
    },
    "long wavelengths": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.fixture(scope="module", autouse=True)
def _needs_kernels():
    if library.choose().library is None:
        pytest.skip(library.choose().reason)


@pytest.fixture
def folder(tmp_path):
    def write(name="tied"):
        config = _BASE | _FAMILIES[name]
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(_weights(config), tmp_path / "model.safetensors")
        return str(tmp_path)

    return write


def _weights(config):
    generator = torch.Generator().manual_seed(1)
    kind = config["model_type"]

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {
        "model.embed_tokens.weight": draw(_VOCABULARY, _HIDDEN),
        "model.norm.weight": draw(_HIDDEN),
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = draw(_VOCABULARY, _HIDDEN)
    sizes = {"q": _HEADS * _DIM, "k": _KV_HEADS * _DIM, "v": _KV_HEADS * _DIM}
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        for part, size in sizes.items():
            weights[f"{prefix}.self_attn.{part}_proj.weight"] = draw(size, _HIDDEN)
            if kind == "qwen2":
                weights[f"{prefix}.self_attn.{part}_proj.bias"] = draw(size)
        if kind == "qwen3":
            weights[f"{prefix}.self_attn.q_norm.weight"] = draw(_DIM)
            weights[f"{prefix}.self_attn.k_norm.weight"] = draw(_DIM)
        weights |= {
            f"{prefix}.self_attn.o_proj.weight": draw(_HIDDEN, _HEADS * _DIM),
            f"{prefix}.input_layernorm.weight": draw(_HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": draw(_HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": draw(_INTERMEDIATE, _HIDDEN),
            f"{prefix}.mlp.up_proj.weight": draw(_INTERMEDIATE, _HIDDEN),
            f"{prefix}.mlp.down_proj.weight": draw(_HIDDEN, _INTERMEDIATE),
        }
    return weights


def _load(folder, cpu_kernels="auto", *, block_size=16, num_threads=1, **settings):
    settings = {"dtype": "float32", "device": "cpu"} | settings
    runner = load_runner(folder, cpu_kernels=cpu_kernels, num_threads=num_threads, **settings)
    num_blocks = _NUM_TOKENS // block_size + 2
    runner.allocate_pool(num_blocks * runner.facts.num_kv_groups, block_size)
    return runner


def _step(runner, first, end, block_size):
    """Tokens [first, end) of one sequence, whose groups take turns in the pool's blocks."""
    num_groups = runner.facts.num_kv_groups
    positions = np.arange(first, end, dtype=np.int32)
    width = (_NUM_TOKENS // block_size + 1) * num_groups
    table = np.arange(width, dtype=np.int32)[::-1].copy()
    logical = positions[:, None] // block_size * num_groups + np.arange(num_groups)
    slots = table[logical].astype(np.int64) * block_size + positions[:, None] % block_size
    one = np.zeros(1, np.int32)
    return StepBatch(
        step=0,
        num_decodes=0,
        rows=one,
        token_ids=(positions * 7 % _VOCABULARY).astype(np.int32),
        positions=positions,
        slots=slots.reshape(-1),
        query_start=np.array([0, end - first], np.int32),
        context_lens=np.array([end], np.int32),
        block_tables=table[None],
        samples=one,
        sample_rows=one,
    )


def _logits(runner, *, chunk=_NUM_TOKENS, block_size=16):
    """Logits of every token, computed in chunks."""
    decoder, kv = runner._parts()
    parts = []
    for first in range(0, _NUM_TOKENS, chunk):
        batch = _step(runner, first, min(_NUM_TOKENS, first + chunk), block_size)
        with torch.inference_mode():
            rows = np.arange(len(batch.positions))
            parts.append(decoder.logits(runner._forward(decoder, kv, batch, rows)).clone())
    return torch.cat(parts)


@pytest.mark.parametrize("name", _FAMILIES)
def test_logits_equal_those_of_pytorch(folder, name):
    fused, plain = _load(folder(name)), _load(folder(name), "torch")
    assert fused.facts.kernels.startswith("fused (")
    assert plain.facts.kernels.startswith("torch (")
    assert fused.facts.group_windows == plain.facts.group_windows
    assert fused.facts.window_tokens == plain.facts.window_tokens
    torch.testing.assert_close(_logits(fused), _logits(plain), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("cpu_kernels", "num_calls"), [("auto", 2), ("torch", 0)])
def test_tokens_are_drawn_where_logits_are_computed(folder, monkeypatch, cpu_kernels, num_calls):
    called = []
    for name in ("choose", "total_weights"):
        method = getattr(CpuDraw, name)

        def counting(*arguments, method=method, **parameters):
            called.append(method)
            return method(*arguments, **parameters)

        monkeypatch.setattr(CpuDraw, name, counting)
    runner = _load(folder(), cpu_kernels)
    runner.admit(
        0,
        sampling=SamplingParams(temperature=0.9, seed=5, num_logprobs=2),
        sample_index=0,
        token_ids=np.arange(9, dtype=np.int32),
        num_prompt_tokens=9,
    )
    output = runner.execute(_step(runner, 0, 9, 16))
    assert 0 <= output.token_ids[0] < _VOCABULARY
    assert len(called) == num_calls


@pytest.mark.parametrize("name", ["tied", "mixed windows"])
@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.02)])
def test_narrow_keys_and_values_are_as_exact_as_those_of_pytorch(folder, name, kv_dtype, tolerance):
    exact = _logits(_load(folder(name), "torch"))
    for kernels in ("auto", "torch"):
        found = _logits(_load(folder(name), kernels, kv_dtype=kv_dtype))
        error = float((found - exact).norm() / exact.norm())
        assert 0 < error < tolerance, f"{kernels}: {error}"


def test_bfloat16_weights_are_nearer_to_the_truth_than_with_pytorch(folder):
    exact = _logits(_load(folder(), "torch"))

    def error(kernels):
        found = _logits(_load(folder(), kernels, dtype="bfloat16"))
        return float((found - exact).norm() / exact.norm())

    assert error("auto") < error("torch")


@pytest.mark.parametrize("name", ["qwen3", "mixed windows"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_blocks_and_threads_change_no_bit(folder, name, dtype):
    whole = _logits(_load(folder(name), dtype=dtype))
    for chunk, block_size, num_threads in ((1, 16, 1), (7, 1, 2), (64, 256, 3)):
        runner = _load(folder(name), dtype=dtype, block_size=block_size, num_threads=num_threads)
        logits = _logits(runner, chunk=chunk, block_size=block_size)
        assert torch.equal(logits, whole), f"{chunk=} {block_size=} {num_threads=}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [[], [8], [5, 0, 5], [*range(9), 4, 4]], ids=str)
def test_wanted_rows_are_those_of_the_whole_in_any_order(folder, dtype, rows):
    runner = _load(folder(), dtype=dtype, num_threads=2)
    decoder, kv = runner._parts()
    batch = _step(runner, 0, 9, 16)
    with torch.inference_mode():
        whole = runner._forward(decoder, kv, batch, np.arange(9)).clone()
        wanted = runner._forward(decoder, kv, batch, np.array(rows, dtype=np.int64))
    assert torch.equal(wanted, whole[rows])


def test_phases_are_counted_once_asked_for(folder):
    runner = _load(folder())
    decoder, _ = runner._parts()
    assert isinstance(decoder, FusedDecoder)
    assert decoder.model.phase_ns is None
    decoder.model.measure()
    _logits(runner)
    assert len(decoder.model.phase_ns) == len(PHASES)
    assert (decoder.model.phase_ns > 0).all()


def test_a_token_outside_the_vocabulary_is_refused(folder):
    runner = _load(folder())
    decoder, kv = runner._parts()
    batch = _step(runner, 0, 3, 16)
    batch.token_ids[1] = _VOCABULARY
    with pytest.raises(InternalError, match="refused its arguments"):
        runner._forward(decoder, kv, batch, np.zeros(1, np.int64))


def test_what_the_kernels_cannot_take_goes_to_pytorch(folder):
    runner = _load(folder(), dtype="float16")
    assert runner.facts.kernels == "torch (no kernels for torch.float16)"
    odd = parse_decoder_config(_BASE | {"head_dim": 12})
    assert "12 channels per head" in why_not(odd, torch.float32, torch.float32)
    assert "fp8" not in why_not(odd, torch.float32, torch.int8)
    assert why_not(odd, torch.float32, torch.float8_e4m3fn).startswith("no kernels for keys")


def test_kernels_that_were_named_and_cannot_are_an_error(folder):
    chosen = library.choose().library
    assert chosen is not None
    with pytest.raises(PreconditionError, match="cannot compute this model"):
        _load(folder(), chosen.isa, dtype="float16")
