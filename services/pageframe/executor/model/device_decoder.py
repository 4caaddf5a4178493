"""Llama-shaped models on a GPU: what is between two matrix products is one kernel.

    ─▶ residual + norm ─ q,k,v ─ rotary + write ─ paged attention ─ output ─▶ residual + norm ─
       gate,up ─ SwiGLU ─ down ─▶ residual + norm of the next layer ...

Weights, projections and attention are those of ``native``. What a layer gives is added to the
residual stream by the norm that comes next, so that the stream is read once per half of a layer.
"""

import torch

from pageframe.executor.model.decoder_config import DecoderConfig, Family
from pageframe.executor.model.native import NativeDecoder
from pageframe.executor.model.native_parts import Layer, Norm
from pageframe.executor.model.paged_kv import PagedKv
from pageframe.executor.model.rope import RotaryAngles
from pageframe.kernels.ops.residual_norm import SIZE_MAX, residual_norm
from pageframe.kernels.ops.rotary_write import rotary_write
from pageframe.kernels.ops.swiglu import swiglu
from pageframe.kernels.scratch import Scratch

# Compute capabilities that have bfloat16, and conversions to and from fp8.
_BF16_MIN, _FP8_MIN = (8, 0), (8, 9)
_CAPABILITY_MIN = (7, 5)
_FLOAT_BYTES = 4


def fits_kernels(
    config: DecoderConfig,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    capability: tuple[int, int],
) -> bool:
    """Whether the kernels take a model of these sizes and types on such a chip."""
    if config.family is not Family.LLAMA:
        return False
    needed = _CAPABILITY_MIN
    if dtype == torch.bfloat16:
        needed = _BF16_MIN
    if kv_dtype == torch.float8_e4m3fn:
        needed = _FP8_MIN
    return capability >= needed and config.hidden_size <= SIZE_MAX and config.head_dim % 2 == 0


class DeviceDecoder(NativeDecoder):
    """A ``NativeDecoder`` whose steps run in few kernels; needs Triton."""

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self._config.num_heads

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self._dtype

    @property
    def scratch(self) -> Scratch:
        """Where it keeps what lives within a step."""
        return self._scratch

    def activation_bytes(self, num_tokens: int) -> int:
        """Memory that a step of so many tokens takes in ``forward``, attention's partials apart."""
        config, head_dim = self._config, self._config.head_dim
        num_projected = (config.num_heads + 2 * config.num_kv_heads) * head_dim
        # What is there at a time: the stream, its norm and what a half of a layer gives; the
        # projection and what attention made of it; gate and up, and both together.
        num_channels = 4 * config.hidden_size + num_projected + config.num_heads * head_dim
        num_channels += 3 * config.intermediate_size
        channel_bytes, angle_bytes = int(self._dtype.itemsize), 3 * head_dim * _FLOAT_BYTES
        return num_tokens * (num_channels * channel_bytes + angle_bytes)

    def write_logits(self, outputs: torch.Tensor, logits: torch.Tensor) -> None:
        """Write what ``logits`` would return into a tensor of that shape, in one pass."""
        logits.copy_(self._head(outputs))

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
        delta: torch.Tensor | None = None
        for index, layer in enumerate(self._layers):
            normed = self._add_and_norm(hidden, delta, layer.attention_norm)
            delta = self._attend_normed(kv, index, layer, normed, angles)
            assert layer.feed_forward_norm is not None, f"layer {index} has one norm"
            normed = self._add_and_norm(hidden, delta, layer.feed_forward_norm)
            gate_up = layer.feed_forward.up(normed)
            activated = self._scratch.take(
                "activated", gate_up.shape[0], self._config.intermediate_size
            )
            delta = layer.feed_forward.down(swiglu(gate_up, activated))
        assert delta is not None, "a model without layers"
        last, last_delta = hidden.index_select(0, rows), delta.index_select(0, rows)
        return residual_norm(
            last, last_delta, self._final_norm.weight, self._config.norm_epsilon, last_delta
        )

    def _add_and_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, norm: Norm
    ) -> torch.Tensor:
        normed = self._scratch.take("normed", *hidden.shape)
        return residual_norm(hidden, delta, norm.weight, norm.epsilon, normed)

    def _attend_normed(
        self,
        kv: PagedKv,
        index: int,
        layer: Layer,
        normed: torch.Tensor,
        angles: RotaryAngles,
    ) -> torch.Tensor:
        config = self._config
        num_tokens = normed.shape[0]
        heads = layer.query_key_value(normed).view(
            num_tokens, config.num_heads + 2 * config.num_kv_heads, config.head_dim
        )
        cells = kv.cells(index)
        # In place: nobody reads the unrotated ones again.
        queries = rotary_write(
            heads,
            angles.cosines[:, 0, : config.head_dim // 2],
            angles.sines[:, 0],
            heads[:, : config.num_heads],
            cells.layer,
            cells.slots,
            kv_scales=cells.scales,
            norm_weight=layer.query_key_norm,
            epsilon=config.norm_epsilon,
        )
        mixed = kv.attend_written(index, queries, scale=config.head_dim**-0.5, window=layer.window)
        return layer.attention_output(mixed.view(num_tokens, -1))
