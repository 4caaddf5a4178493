"""Models that need no model class: weights and tensor operations, fused and lean.

    token ids ─▶ embedding ─▶ [ norm ─ q,k,v ─ (q,k norm) ─ rotary ─ paged attention ─ output ─ +
                                norm ─ gate,up ─ SiLU x up ─ down ─ + ] x layers ─▶ norm ─▶ head

One projection makes queries, keys and values, one makes gate and up. Query and key heads lie next
to one another in its result, so that one rotation turns both. Buffers are reused between steps.
Norms and rotary angles are computed in float32, as Hugging Face does.

This is Llama's way; how others differ is in their ``DecoderConfig``.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import rms_norm

from pageframe.executor.model.decoder import KvShape
from pageframe.executor.model.decoder_config import DecoderConfig
from pageframe.executor.model.native_parts import Layer, alibi_of
from pageframe.executor.model.native_weights import read_weights
from pageframe.executor.model.paged_kv import PagedKv
from pageframe.executor.model.rope import RotaryAngles, inverse_frequencies
from pageframe.executor.model.weights import Progress, WeightReader
from pageframe.kernels.scratch import Scratch

OpenWeights = Callable[[Path, torch.dtype, torch.device, Progress], WeightReader]
"""Opens the weights of a folder, in a dtype, on a device."""


class NativeDecoder:
    """A ``Decoder`` for ``decoder_config.NATIVE_MODEL_TYPES``.

    Attributes:
        kv_shape: Keys and values per token.
        reads_batch: False.
        windows: Of each layer, positions that a token sees, itself included; 0 for all.
    """

    reads_batch = False

    def __init__(
        self,
        folder: Path,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
        *,
        open_weights: OpenWeights = WeightReader,
    ) -> None:
        """Read the weights.

        Args:
            folder: Hugging Face folder.
            config: What its ``config.json`` says.
            dtype: Of weights.
            device: Where they go.
            progress: Told how far reading is.
            open_weights: Who reads them; a measurement makes them up instead.

        Raises:
            NotFoundError: the folder has no safetensors files.
            InvalidRequestError: they do not hold what the config says.
        """
        self.kv_shape = KvShape(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        self.windows = [window or 0 for window in config.windows]
        self._config = config
        self._scratch = Scratch(dtype, device)
        self._dtype = dtype
        self._frequencies = inverse_frequencies(
            config.head_dim, config.rope_type, config.rope_parameters
        ).to(device)
        self._alibi = alibi_of(config, device)
        with open_weights(folder, dtype, device, progress) as reader:
            weights = read_weights(reader, config, self._scratch)
        self._embedding = weights.embedding
        self._layers = weights.layers
        self._final_norm = weights.final_norm
        self._head = weights.head

    def forward(
        self,
        kv: PagedKv,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Run all layers; normalised hidden states of ``rows``. See ``Decoder.forward``."""
        config = self._config
        angles = None
        if not config.has_alibi:
            angles = RotaryAngles(positions, self._frequencies, self._dtype)
        hidden = self._scratch.take("hidden", token_ids.shape[0], config.hidden_size)
        torch.index_select(self._embedding, 0, token_ids, out=hidden)
        for index, layer in enumerate(self._layers):
            normed = layer.attention_norm(hidden)
            attended = self._attention(kv, index, layer, normed, angles)
            if not config.is_parallel:
                hidden += attended
            given = normed
            if layer.feed_forward_norm is not None:
                given = layer.feed_forward_norm(hidden)
            fed = layer.feed_forward(given)
            if config.is_parallel:
                fed += attended
            hidden += fed
        return self._final_norm(hidden.index_select(0, rows))

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits of normalised hidden states. See ``Decoder.logits``."""
        return self._head(outputs).float()

    def _attention(
        self,
        kv: PagedKv,
        index: int,
        layer: Layer,
        normed: torch.Tensor,
        angles: RotaryAngles | None,
    ) -> torch.Tensor:
        config = self._config
        num_tokens = normed.shape[0]
        num_rotated = config.num_heads + config.num_kv_heads
        heads = layer.query_key_value(normed).view(
            num_tokens, num_rotated + config.num_kv_heads, config.head_dim
        )
        rotated = heads[:, :num_rotated]
        if layer.query_key_norm is not None:
            normalised = rms_norm(rotated, (config.head_dim,), None, config.norm_epsilon)
            rotated = normalised.mul_(layer.query_key_norm)
        if angles is not None:
            rotated = angles.rotate(rotated, self._scratch.take("rotated", *rotated.shape))
        mixed = kv.attend(
            index,
            rotated[:, : config.num_heads],
            rotated[:, config.num_heads :],
            heads[:, num_rotated:],
            scale=config.head_dim**-0.5,
            window=layer.window,
            alibi=self._alibi,
        )
        return layer.attention_output(mixed.view(num_tokens, -1))
