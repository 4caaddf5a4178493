"""Reads layers of Falcon's three designs.

Queries, keys and values come from one matrix, in which every head of keys stands behind the query
heads that share it:

    stored   [ q q q k v | q q q k v | ... ]     one group for each head of keys
    wanted   [ q q q q q q ... | k k ... | v v ... ]

One head of keys for all queries, one for each, or something between: the same cut.
"""

import torch

from pageframe.executor.model.decoder_config import DecoderConfig
from pageframe.executor.model.linear import Linear
from pageframe.executor.model.native_parts import FeedForward, Layer, LayerReader, Norm
from pageframe.executor.model.weights import WeightReader
from pageframe.kernels.scratch import Scratch


def read_falcon_layer(
    reader: WeightReader, config: DecoderConfig, scratch: Scratch, index: int
) -> Layer:
    """Layer ``index``; see ``native_weights.read_weights``."""
    return _Layer(reader, config, scratch, index, "transformer.h").read()


class _Layer(LayerReader):
    """Reads one layer."""

    def read(self) -> Layer:
        config = self._config
        hidden, wide = config.hidden_size, config.intermediate_size
        attention_norm, feed_forward_norm = self._norms()
        return Layer(
            attention_norm=attention_norm,
            query_key_value=self._query_key_value(),
            query_key_norm=None,
            # Both halves of a parallel layer are there at once, so each has a buffer of its own.
            attention_output=self._linear("attended", "self_attention.dense", hidden, hidden),
            feed_forward_norm=feed_forward_norm,
            feed_forward=FeedForward(
                config.activation,
                self._linear("up", "mlp.dense_h_to_4h", hidden, wide),
                self._linear("output", "mlp.dense_4h_to_h", wide, hidden),
                self._scratch,
            ),
            window=config.windows[self._index],
        )

    def _norms(self) -> tuple[Norm, Norm | None]:
        """Of attention and of the feed-forward part; named by how many a parallel layer has."""
        config = self._config
        if not config.has_feed_forward_norm:
            return self._norm("input_layernorm"), None
        if config.is_parallel:
            return self._norm("ln_attn"), self._norm("ln_mlp")
        return self._norm("input_layernorm"), self._norm("post_attention_layernorm")

    def _query_key_value(self) -> Linear:
        config, path = self._config, f"{self._prefix}.self_attention.query_key_value"
        num_outputs = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        weight = self._reader.read(f"{path}.weight", num_outputs, config.hidden_size)
        return Linear(
            _queries_first(weight, config),
            self._bias(path, num_outputs, is_interleaved=True),
            self._scratch,
            "query_key_value",
        )

    def _linear(self, buffer: str, name: str, num_inputs: int, num_outputs: int) -> Linear:
        path = f"{self._prefix}.{name}"
        weight = self._reader.read(f"{path}.weight", num_outputs, num_inputs)
        return Linear(weight, self._bias(path, num_outputs), self._scratch, buffer)

    def _bias(
        self, path: str, num_outputs: int, *, is_interleaved: bool = False
    ) -> torch.Tensor | None:
        if f"{path}.bias" not in self._reader:
            return None
        bias = self._reader.read(f"{path}.bias", num_outputs)
        return _queries_first(bias, self._config) if is_interleaved else bias


def _queries_first(stored: torch.Tensor, config: DecoderConfig) -> torch.Tensor:
    """Rows of queries, then those of keys, then those of values; shape as ``stored``."""
    group_size = config.num_heads // config.num_kv_heads
    groups = stored.unflatten(0, (config.num_kv_heads, group_size + 2, config.head_dim))
    parts = groups.split([group_size, 1, 1], dim=1)
    return torch.cat([part.flatten(0, 2) for part in parts])
