"""Weights of a whole model for the native runner, whatever its family calls them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pageframe.executor.model.decoder_config import DecoderConfig, Family
from pageframe.executor.model.falcon_weights import read_falcon_layer
from pageframe.executor.model.linear import Linear
from pageframe.executor.model.llama_weights import read_llama_layer
from pageframe.executor.model.native_parts import Layer, Norm, read_norm
from pageframe.executor.model.weights import WeightReader
from pageframe.kernels.scratch import Scratch


class _Names(NamedTuple):
    """Where a family keeps what is outside of layers, and who reads its layers."""

    embedding: str
    final_norm: str
    read_layer: Callable[[WeightReader, DecoderConfig, Scratch, int], Layer]


_NAMES = {
    Family.LLAMA: _Names("model.embed_tokens.weight", "model.norm", read_llama_layer),
    Family.FALCON: _Names(
        "transformer.word_embeddings.weight", "transformer.ln_f", read_falcon_layer
    ),
}
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """Weights of a whole model.

    Attributes:
        embedding: shape (vocab_size, hidden).
        layers: One after the other.
        final_norm: Behind the last.
        head: hidden to vocab_size.
    """

    embedding: torch.Tensor
    layers: list[Layer]
    final_norm: Norm
    head: Linear


def read_weights(reader: WeightReader, config: DecoderConfig, scratch: Scratch) -> DecoderWeights:
    """Read all weights.

    Args:
        reader: Open.
        config: Sizes that the tensors must have.
        scratch: Memory that linear layers give their results in.

    Raises:
        InvalidRequestError: MODEL_WEIGHTS_INVALID.
    """
    names = _NAMES[config.family]
    vocabulary = (config.vocab_size, config.hidden_size)
    embedding = reader.read(names.embedding, *vocabulary)
    # Some checkpoints say they are not tied and store no head of their own.
    is_tied = config.is_tied or _HEAD not in reader
    head = embedding if is_tied else reader.read(_HEAD, *vocabulary)
    return DecoderWeights(
        embedding=embedding,
        layers=[
            names.read_layer(reader, config, scratch, index) for index in range(config.num_layers)
        ],
        final_norm=read_norm(reader, config, names.final_norm),
        head=Linear(head, None, scratch, "logits"),
    )
