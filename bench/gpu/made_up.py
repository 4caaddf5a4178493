"""A Llama of any size whose weights are made up: nothing is downloaded, all engines have the same.

A tensor's numbers follow from its name, so that whoever asks for it, in whatever order, gets the
same on the same device. They are drawn on that device: 8 billion of them in seconds.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch

from bench.gpu.lab import Sizes
from pageframe.executor.model.weights import Progress, WeightReader

_SPREAD = 0.02
"""Standard deviation of matrices, as models are initialised with."""


def llama_config(sizes: Sizes, max_model_len: int, dtype: str = "bfloat16") -> dict[str, Any]:
    """A ``config.json`` of Hugging Face."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": max_model_len,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": dtype,
    }


def weight_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """All tensors of the model, named as Hugging Face does."""
    hidden, wide = sizes.hidden_size, sizes.intermediate_size
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (sizes.vocab_size, hidden),
    }
    of_layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    for layer in range(sizes.num_layers):
        for name, shape in of_layer.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return shapes


def num_weights_of_step(sizes: Sizes) -> int:
    """Weights that each step reads: all but the embedding, of which it reads a few rows."""
    return sum(
        torch.Size(shape).numel()
        for name, shape in weight_shapes(sizes).items()
        if name != "model.embed_tokens.weight"
    )


def make_up(name: str, tensor: torch.Tensor) -> None:
    """Fill ``tensor`` in place with the numbers of ``name``: ones for a norm, else random ones."""
    if tensor.dim() == 1:
        tensor.fill_(1.0)
        return
    numbers = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
    tensor.normal_(0.0, _SPREAD, generator=numbers)


class MadeUpWeights(WeightReader):
    """Weights of ``sizes`` in place of a folder's; in all else what it stands in for."""

    def __init__(
        self, sizes: Sizes, dtype: torch.dtype, device: torch.device, progress: Progress
    ) -> None:
        self._shapes = weight_shapes(sizes)
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._num_bytes_read = 0
        self._num_bytes_total = dtype.itemsize * sum(
            torch.Size(shape).numel() for shape in self._shapes.values()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def borrow(self, name: str, *shape: int) -> torch.Tensor:
        """There is no file to borrow from."""
        return self.read(name, *shape)

    def read_stacked(self, names: Iterable[str], *shape: int) -> torch.Tensor:
        """As of a folder."""
        whole = torch.empty(shape, dtype=self._dtype, device=self._device)
        filled = 0
        for name in names:
            num_rows = self._shapes[name][0]
            part = whole[filled : filled + num_rows]
            if part.shape != self._shapes[name]:
                raise self._wrong_shape(name, self._shapes[name], shape)
            make_up(name, part)
            filled += num_rows
            self._count(part)
        if filled != shape[0]:
            raise self._wrong_shape(name, (filled, *shape[1:]), shape)
        return whole


def opener(sizes: Sizes) -> Any:
    """What ``NativeDecoder`` opens weights with."""

    def open_weights(
        _folder: Path, dtype: torch.dtype, device: torch.device, progress: Progress
    ) -> WeightReader:
        return MadeUpWeights(sizes, dtype, device, progress)

    return open_weights
