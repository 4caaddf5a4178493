"""Other makers' kernels: what each is called with, by stand-ins that keep it."""

import sys
import types

import numpy as np
import pytest
import torch

from bench.gpu import peers


@pytest.fixture
def work():
    """Two sequences of 5 and 9 tokens that decode, in blocks of 4."""
    layers = [torch.full((6, 2, 4, 1, 8), float(index)) for index in range(2)]
    return peers.Work(
        query=torch.zeros(2, 2, 8),
        query_start=np.array([0, 1, 2], np.int32),
        lengths=np.array([5, 9], np.int32),
        tables=np.array([[1, 4, 0], [2, 0, 5]], np.int32),
        layers=layers,
        scale=0.5,
        is_prefill=False,
    )


def _stand_in(monkeypatch, name, function):
    """A module whose ``function`` keeps what it is called with."""
    calls: list = []
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        path = ".".join(parts[:count])
        module = types.ModuleType(path)
        module.__path__ = []
        module.__spec__ = types.SimpleNamespace()
        monkeypatch.setitem(sys.modules, path, module)
    setattr(
        module, function, lambda *arguments, **named: calls.append((arguments, named)) or "done"
    )
    return calls


def _shown(named):
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) and value.dim() < 3 else value
        for name, value in named.items()
        if name not in {"q", "k", "v", "out"}
    }


def test_flash_attention_of_vllm_reads_our_blocks_through_our_tables(monkeypatch, work):
    name = "vllm.vllm_flash_attn.flash_attn_interface"
    calls = _stand_in(monkeypatch, name, "flash_attn_varlen_func")
    sys.modules[name].FA3_AVAILABLE = True
    assert [launch() for launch in peers.flash_attention_3(work)] == ["done", "done"]
    for layer, (arguments, named) in zip(work.layers, calls, strict=True):
        assert not arguments
        assert named["q"] is work.query
        assert named["k"].data_ptr() == layer.data_ptr()
        assert named["v"].data_ptr() == layer[:, 1].data_ptr()
        assert _shown(named) == {
            "max_seqlen_q": 1,
            "cu_seqlens_q": [0, 1, 2],
            "max_seqlen_k": 9,
            "seqused_k": [5, 9],
            "softmax_scale": 0.5,
            "causal": True,
            "block_table": [[1, 4, 0], [2, 0, 5]],
            "fa_version": 3,
        }


def test_a_library_that_cannot_be_loaded_is_told_in_its_words(monkeypatch, work):
    name = "vllm.vllm_flash_attn.flash_attn_interface"
    _stand_in(monkeypatch, name, "flash_attn_varlen_func")
    module = sys.modules[name]
    module.FA3_AVAILABLE, module.FA3_UNAVAILABLE_REASON = False, "no symbol _ZN2at"
    with pytest.raises(ImportError, match="no symbol _ZN2at"):
        peers.flash_attention_3(work)


def test_the_own_package_of_flash_attention_comes_first(monkeypatch, work):
    calls = _stand_in(monkeypatch, "flash_attn_interface", "flash_attn_with_kvcache")
    assert [launch() for launch in peers.flash_attention_3(work)] == ["done", "done"]
    (query, keys, values), named = calls[1]
    assert query.shape == (2, 1, 2, 8)
    assert keys.shape == values.shape == (6, 4, 1, 8)
    assert _shown(named) == {
        "cache_seqlens": [5, 9],
        "page_table": [[1, 4, 0], [2, 0, 5]],
        "softmax_scale": 0.5,
        "causal": True,
    }


def test_vllms_triton_kernel_gets_the_same(monkeypatch, work):
    name = "vllm.v1.attention.ops.triton_unified_attention"
    calls = _stand_in(monkeypatch, name, "unified_attention")
    assert [launch() for launch in peers.vllm_triton(work)] == ["done", "done"]
    shown = _shown(calls[0][1])
    assert shown["block_table"] == [[1, 4, 0], [2, 0, 5]]
    assert shown["seqused_k"] == [5, 9]
    assert (shown["max_seqlen_q"], shown["max_seqlen_k"], shown["causal"]) == (1, 9, True)
