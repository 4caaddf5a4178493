"""Llama-shaped models, fused and lean: weights and tensor operations, no model class.

    token ids ─▶ embedding ─▶ [ norm ─ q,k,v ─ (q,k norm) ─ rotary ─ paged attention ─ output ─ +
                                norm ─ gate,up ─ SiLU x up ─ down ─ + ] x layers ─▶ norm ─▶ head

One projection makes queries, keys and values, one makes gate and up. Query and key heads lie next
to one another in its result, so that one rotation turns both. Buffers are reused between steps.
Norms and rotary angles are computed in float32, as Hugging Face does.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import rms_norm, silu

from pageframe.executor.model.decoder import KvShape
from pageframe.executor.model.decoder_config import DecoderConfig
from pageframe.executor.model.linear import Linear
from pageframe.executor.model.paged_kv import PagedKv
from pageframe.executor.model.rope import RotaryAngles, inverse_frequencies
from pageframe.executor.model.weights import Progress, WeightReader
from pageframe.kernels.scratch import Scratch


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Weights of one layer; I is the intermediate size, D the head size.

    Attributes:
        attention_norm: shape (hidden,).
        query_key_value: hidden to (num_heads + 2 * num_kv_heads) * D.
        query_key_norm: shape (num_heads + num_kv_heads, D), or None.
        attention_output: num_heads * D to hidden.
        feed_forward_norm: shape (hidden,).
        gate_up: hidden to 2 * I.
        down: I to hidden.
        window: Positions that a token sees; None for all.
    """

    attention_norm: torch.Tensor
    query_key_value: Linear
    query_key_norm: torch.Tensor | None
    attention_output: Linear
    feed_forward_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    window: int | None


class NativeDecoder:
    """A ``Decoder`` for ``decoder_config.NATIVE_MODEL_TYPES``."""

    def __init__(
        self,
        folder: Path,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Read the weights.

        Raises:
            NotFoundError: the folder has no safetensors files.
            InvalidRequestError: they do not hold what the config says.
        """
        self.kv_shape = KvShape(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        self._config = config
        self._scratch = Scratch(dtype, device)
        self._dtype = dtype
        self._frequencies = inverse_frequencies(
            config.head_dim, config.rope_type, config.rope_parameters
        ).to(device)
        with WeightReader(folder, dtype, device, progress) as reader:
            vocabulary = (config.vocab_size, config.hidden_size)
            self._embedding = reader.read("model.embed_tokens.weight", *vocabulary)
            self._layers = [self._read_layer(reader, index) for index in range(config.num_layers)]
            self._final_norm = reader.read("model.norm.weight", config.hidden_size)
            # Some checkpoints say they are not tied and store no head of their own.
            is_tied = config.is_tied or "lm_head.weight" not in reader
            head = self._embedding if is_tied else reader.read("lm_head.weight", *vocabulary)
            self._head = Linear(head, None, self._scratch, "logits")

    def forward(
        self,
        kv: PagedKv,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Run all layers; normalised hidden states of ``rows``. See ``Decoder.forward``."""
        angles = RotaryAngles(positions, self._frequencies, self._dtype)
        hidden = self._scratch.take("hidden", token_ids.shape[0], self._config.hidden_size)
        torch.index_select(self._embedding, 0, token_ids, out=hidden)
        for index, layer in enumerate(self._layers):
            hidden += self._attention(kv, index, layer, hidden, angles)
            hidden += self._feed_forward(layer, hidden)
        return self._norm(hidden.index_select(0, rows), self._final_norm)

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits of normalised hidden states. See ``Decoder.logits``."""
        return self._head(outputs).float()

    def _attention(
        self,
        kv: PagedKv,
        index: int,
        layer: Layer,
        hidden: torch.Tensor,
        angles: RotaryAngles,
    ) -> torch.Tensor:
        config = self._config
        num_tokens = hidden.shape[0]
        num_rotated = config.num_heads + config.num_kv_heads
        heads = layer.query_key_value(self._norm(hidden, layer.attention_norm)).view(
            num_tokens, num_rotated + config.num_kv_heads, config.head_dim
        )
        rotated = heads[:, :num_rotated]
        if layer.query_key_norm is not None:
            normalised = rms_norm(rotated, (config.head_dim,), None, config.norm_epsilon)
            rotated = normalised.mul_(layer.query_key_norm)
        rotated = angles.rotate(rotated, self._scratch.take("rotated", *rotated.shape))
        mixed = kv.attend(
            index,
            rotated[:, : config.num_heads],
            rotated[:, config.num_heads :],
            heads[:, num_rotated:],
            scale=config.head_dim**-0.5,
            window=layer.window,
        )
        return layer.attention_output(mixed.view(num_tokens, -1))

    def _feed_forward(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = layer.gate_up(self._norm(hidden, layer.feed_forward_norm)).chunk(2, dim=-1)
        activated = self._scratch.take("activated", *gate.shape)
        return layer.down(torch.mul(silu(gate, inplace=True), up, out=activated))

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, (self._config.hidden_size,), weight, self._config.norm_epsilon)

    def _read_layer(self, reader: WeightReader, index: int) -> Layer:
        config = self._config
        prefix = f"model.layers.{index}"
        heads_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        query_key_norm = None
        if config.has_qk_norm:
            query_key_norm = torch.cat(
                [
                    reader.read(f"{prefix}.self_attn.{part}_norm.weight", config.head_dim).expand(
                        count, -1
                    )
                    for part, count in (("q", config.num_heads), ("k", config.num_kv_heads))
                ]
            )

        def linear(name: str, parts: tuple[str, ...], num_inputs: int, num_outputs: int) -> Linear:
            paths = [f"{prefix}.{part}_proj" for part in parts]
            weight = reader.read_stacked(
                [f"{path}.weight" for path in paths], num_outputs, num_inputs
            )
            bias = None
            if f"{paths[0]}.bias" in reader:
                bias = reader.read_stacked([f"{path}.bias" for path in paths], num_outputs)
            return Linear(weight, bias, self._scratch, name)

        return Layer(
            attention_norm=reader.read(f"{prefix}.input_layernorm.weight", config.hidden_size),
            query_key_value=linear(
                "query_key_value",
                ("self_attn.q", "self_attn.k", "self_attn.v"),
                config.hidden_size,
                heads_size + 2 * kv_size,
            ),
            query_key_norm=query_key_norm,
            attention_output=linear("output", ("self_attn.o",), heads_size, config.hidden_size),
            feed_forward_norm=reader.read(
                f"{prefix}.post_attention_layernorm.weight", config.hidden_size
            ),
            gate_up=linear(
                "gate_up", ("mlp.gate", "mlp.up"), config.hidden_size, 2 * config.intermediate_size
            ),
            down=linear("output", ("mlp.down",), config.intermediate_size, config.hidden_size),
            window=config.windows[index],
        )
