"""Reads layers whose tensors are named as Llama's are."""

import torch

from pageframe.executor.model.decoder_config import DecoderConfig
from pageframe.executor.model.linear import Linear
from pageframe.executor.model.native_parts import FeedForward, Layer, LayerReader
from pageframe.executor.model.weights import WeightReader
from pageframe.kernels.scratch import Scratch


def read_llama_layer(
    reader: WeightReader, config: DecoderConfig, scratch: Scratch, index: int
) -> Layer:
    """Layer ``index``; see ``native_weights.read_weights``."""
    return _Layer(reader, config, scratch, index, "model.layers").read()


class _Layer(LayerReader):
    """Reads one layer."""

    def read(self) -> Layer:
        config = self._config
        heads_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        hidden, wide = config.hidden_size, config.intermediate_size
        return Layer(
            attention_norm=self._norm("input_layernorm"),
            query_key_value=self._linear(
                "query_key_value",
                ("self_attn.q", "self_attn.k", "self_attn.v"),
                hidden,
                heads_size + 2 * kv_size,
            ),
            query_key_norm=self._query_key_norm() if config.has_qk_norm else None,
            attention_output=self._linear("output", ("self_attn.o",), heads_size, hidden),
            feed_forward_norm=self._norm("post_attention_layernorm"),
            feed_forward=FeedForward(
                config.activation,
                self._linear("gate_up", ("mlp.gate", "mlp.up"), hidden, 2 * wide),
                self._linear("output", ("mlp.down",), wide, hidden),
                self._scratch,
            ),
            window=config.windows[self._index],
        )

    def _query_key_norm(self) -> torch.Tensor:
        config = self._config
        return torch.cat(
            [
                self._reader.read(
                    f"{self._prefix}.self_attn.{part}_norm.weight", config.head_dim
                ).expand(count, -1)
                for part, count in (("q", config.num_heads), ("k", config.num_kv_heads))
            ]
        )

    def _linear(
        self, name: str, parts: tuple[str, ...], num_inputs: int, num_outputs: int
    ) -> Linear:
        """Matrices one below the other, as one layer."""
        reader = self._reader
        paths = [f"{self._prefix}.{part}_proj" for part in parts]
        weight = reader.read_stacked([f"{path}.weight" for path in paths], num_outputs, num_inputs)
        bias = None
        if f"{paths[0]}.bias" in reader:
            bias = reader.read_stacked([f"{path}.bias" for path in paths], num_outputs)
        return Linear(weight, bias, self._scratch, name)
