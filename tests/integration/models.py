"""Small models as Hugging Face folders, written without torch: quick, and the same every time."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from unit.gateway import tiny_tokenizers

EOS_TOKEN_ID = 1
_HIDDEN, _INNER, _HEADS, _KV_HEADS, _LAYERS = 64, 96, 4, 2, 2
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_config_and_tokenizer(folder: Path, *, max_model_len: int) -> Path:
    """All that the ``sim`` runner needs of a model."""
    tiny_tokenizers.byte_level(folder)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer_config["chat_template"] = _TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size(folder),
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HIDDEN // _HEADS,
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": EOS_TOKEN_ID,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_llama(folder: Path, *, max_model_len: int) -> Path:
    """The same with random weights, wide enough for logits that differ."""
    write_config_and_tokenizer(folder, max_model_len=max_model_len)
    generator = np.random.default_rng(0)
    kv_width = _HIDDEN // _HEADS * _KV_HEADS
    shapes = {"model.embed_tokens": (vocab_size(folder), _HIDDEN)}
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj": (_HIDDEN, _HIDDEN),
            f"{prefix}.self_attn.k_proj": (kv_width, _HIDDEN),
            f"{prefix}.self_attn.v_proj": (kv_width, _HIDDEN),
            f"{prefix}.self_attn.o_proj": (_HIDDEN, _HIDDEN),
            f"{prefix}.mlp.gate_proj": (_INNER, _HIDDEN),
            f"{prefix}.mlp.up_proj": (_INNER, _HIDDEN),
            f"{prefix}.mlp.down_proj": (_HIDDEN, _INNER),
        }
    norms = [f"model.layers.{layer}.input_layernorm" for layer in range(_LAYERS)]
    norms += [f"model.layers.{layer}.post_attention_layernorm" for layer in range(_LAYERS)]
    tensors = {name: np.ones(_HIDDEN, dtype=np.float32) for name in [*norms, "model.norm"]}
    for name, shape in shapes.items():
        tensors[name] = (0.2 * generator.standard_normal(shape)).astype(np.float32)
    named = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def vocab_size(folder: Path) -> int:
    """Number of token ids of the folder's tokenizer."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = [entry["id"] for entry in tokenizer["added_tokens"]]
    return max([*tokenizer["model"]["vocab"].values(), *added]) + 1
