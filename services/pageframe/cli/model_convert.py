"""Makes a Hugging Face folder out of the embedded model's GGUF file.

Run as a process of its own (``python -m pageframe.cli.model_convert GGUF FOLDER``), so that the
supervisor never holds torch: what conversion needs is given back when it ends. Prints one JSON
object a line, ``{"message": ..., "fraction": ...}``, as it goes.

Weights are read directly, because transformers refuses to save what it loaded from a GGUF file
and parses the whole file three times; the tokenizer is converted by transformers, whose result
round-trips. Weights are stored as bf16: half the disk, and widening to fp32 is exact, so every
engine that reads this folder computes with the same numbers.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import save_file

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hugging_face_name(gguf_name: str) -> str:
    """The Hugging Face name of a Llama tensor, for example of ``blk.3.attn_q.weight``.

    Raises:
        KeyError: if the tensor belongs to no Llama model.
    """
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    _, layer, part, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{suffix}"


def unpermute_rotary(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Put the rows of a q or k projection back into Hugging Face's rotary order.

    GGUF interleaves the two halves that rotate together; Hugging Face keeps them apart.

    Args:
        weight: float32 [num_heads * head_size, hidden_size].
        num_heads: Heads of this projection.

    Returns:
        float32 of the same shape.
    """
    num_rows, hidden_size = weight.shape
    half = num_rows // num_heads // 2
    pairs = weight.reshape(num_heads, half, 2, hidden_size)
    return pairs.swapaxes(1, 2).reshape(num_rows, hidden_size)


def _say(message: str, fraction: float) -> None:
    print(json.dumps({"message": message, "fraction": round(fraction, 3)}), flush=True)


def _field(reader: Any, name: str) -> Any:
    return reader.get_field(name).contents()


def _model_config(reader: Any) -> dict[str, Any]:
    hidden_size = int(_field(reader, "llama.embedding_length"))
    num_heads = int(_field(reader, "llama.attention.head_count"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": int(_field(reader, "tokenizer.ggml.bos_token_id")),
        "dtype": "bfloat16",
        "eos_token_id": int(_field(reader, "tokenizer.ggml.eos_token_id")),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": int(_field(reader, "llama.feed_forward_length")),
        "max_position_embeddings": int(_field(reader, "llama.context_length")),
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": int(_field(reader, "llama.block_count")),
        "num_key_value_heads": int(_field(reader, "llama.attention.head_count_kv")),
        "pad_token_id": int(_field(reader, "tokenizer.ggml.padding_token_id")),
        "pretraining_tp": 1,
        # float32 in the file prints as 9.999999747378752e-06; the model was trained with 1e-05.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {
            "rope_theta": float(_field(reader, "llama.rope.freq_base")),
            "rope_type": "default",
        },
        "tie_word_embeddings": "output.weight" not in {t.name for t in reader.tensors},
        "use_cache": True,
        "vocab_size": int(_field(reader, "llama.vocab_size")),
    }


def _weights(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    for index, tensor in enumerate(reader.tensors):
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = unpermute_rotary(values, config[heads[part]])
        yield (
            hugging_face_name(tensor.name),
            torch.from_numpy(np.array(values, order="C")).to(torch.bfloat16),
        )
        if index % 20 == 0:
            _say("converting weights", 0.15 + 0.35 * index / len(reader.tensors))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _convert_tokenizer(gguf_path: Path, folder: Path, context_length: int) -> None:
    from transformers import AutoTokenizer  # slow to import, and needed only here

    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    tokenizer.save_pretrained(folder)
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    # These two say how *we* loaded it; a reader would take them for its own orders.
    config.pop("is_local", None)
    config.pop("local_files_only", None)
    config["model_max_length"] = context_length
    # A name that every transformers release knows.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(config_path, config)


def convert(gguf_path: Path, folder: Path) -> None:
    """Write config, weights (bf16 safetensors), generation config and tokenizer into ``folder``."""
    _say("reading the model file", 0.0)
    reader: Any = gguf.GGUFReader(gguf_path)  # type: ignore[no-untyped-call,unused-ignore]
    config = _model_config(reader)
    weights = dict(_weights(reader, config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)
    _say("converting the tokenizer", 0.55)
    _convert_tokenizer(gguf_path, folder, config["max_position_embeddings"])
    _say("converted", 1.0)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
