"""Llama-shaped models on compiled CPU kernels: one call per step, weights packed as they are read.

The same models as ``native.NativeDecoder`` takes, and the same order of operations. What PyTorch
does one operation after another is here one walk of all threads through all layers; see
``kernels/cpu/csrc/model.h``.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from pageframe.executor.batch import StepBatch
from pageframe.executor.model.decoder import KvShape
from pageframe.executor.model.decoder_config import DecoderConfig
from pageframe.executor.model.packing import PackingThreads, Part
from pageframe.executor.model.paged_kv import PagedKv
from pageframe.executor.model.rope import inverse_frequencies
from pageframe.executor.model.weights import Progress, WeightReader
from pageframe.kernels.cpu.draw import Choice, CpuDraw
from pageframe.kernels.cpu.library import CpuLibrary
from pageframe.kernels.cpu.linear import DTYPES, GATE, UP, PackedLinear
from pageframe.kernels.cpu.model import (
    HEAD_DIM_MULTIPLE,
    KV_DTYPES,
    CpuArena,
    CpuLayer,
    CpuModel,
    CpuStep,
    CpuWeights,
)

_CPU = torch.device("cpu")


def why_not(config: DecoderConfig, dtype: torch.dtype, kv_dtype: torch.dtype) -> str:
    """Why the kernels cannot take a model; empty if they can."""
    if dtype not in DTYPES:
        return f"no kernels for {dtype}"
    if kv_dtype not in KV_DTYPES:
        return f"no kernels for keys and values in {kv_dtype}"
    if config.head_dim % HEAD_DIM_MULTIPLE:
        return f"{config.head_dim} channels per head are no multiple of {HEAD_DIM_MULTIPLE}"
    return ""


class FusedDecoder:
    """A ``Decoder`` for ``decoder_config.NATIVE_MODEL_TYPES`` on a CPU.

    Attributes:
        kv_shape: Keys and values per token.
        reads_batch: True.
        windows: Of each layer, positions that a token sees, itself included; 0 for all.
        model: The kernels' side; measures its phases when asked to.
        draw: Draws tokens from its logits, by the same threads.
    """

    reads_batch = True

    def __init__(
        self,
        folder: Path,
        config: DecoderConfig,
        dtype: torch.dtype,
        library: CpuLibrary,
        num_threads: int,
        progress: Progress,
    ) -> None:
        """Read the weights.

        Args:
            folder: Hugging Face folder.
            config: What its ``config.json`` says; ``why_not`` has nothing against it.
            dtype: Of packed weights, float32 or bfloat16. Arithmetic is in float32.
            library: Compiled kernels.
            num_threads: Who computes, the caller of ``forward`` included.
            progress: Told how far reading is.

        Raises:
            NotFoundError: the folder has no safetensors files.
            InvalidRequestError: they do not hold what the config says.
            ResourceExhaustedError: OUT_OF_MEMORY.
        """
        self.kv_shape = KvShape(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        self.windows = [window or 0 for window in config.windows]
        with (
            WeightReader(folder, dtype, _CPU, progress) as reader,
            PackingThreads(num_threads) as threads,
        ):
            weights = _Packer(library, config, dtype, reader, threads).model()
        pool = library.create_pool(num_threads)
        self.model = CpuModel(library, pool, weights)
        self.draw = CpuDraw(library, pool)
        self._arena: CpuArena | None = None
        self._arena_of: PagedKv | None = None

    def forward(
        self,
        kv: PagedKv,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Run all layers; normalised hidden states of ``rows``. See ``Decoder.forward``.

        Tokens and positions are taken from the batch of ``kv``.
        """
        return self.model.forward(self._arena_for(kv), _step_of(kv.batch), rows)

    def prepare_decode(
        self,
        kv: PagedKv,
        batch: StepBatch,
        prepare_choice: Callable[[torch.Tensor], Choice],
    ) -> tuple[Callable[[], None], Choice]:
        """Make a step ready that needs nothing of Python; see ``CpuModel.prepare_decode``."""
        rows = torch.from_numpy(batch.sample_tokens)
        return self.model.prepare_decode(self._arena_for(kv), _step_of(batch), rows, prepare_choice)

    def _arena_for(self, kv: PagedKv) -> CpuArena:
        if self._arena is None or self._arena_of is not kv:
            groups = kv.groups
            self._arena = CpuArena(
                kv.arena.blocks, kv.arena.layout, groups.places, len(groups.windows)
            )
            self._arena_of = kv
        return self._arena

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits of normalised hidden states, valid until the next call. See ``Decoder.logits``."""
        return self.model.logits(outputs)


def _step_of(batch: StepBatch) -> CpuStep:
    return CpuStep(
        token_ids=batch.token_ids,
        positions=batch.positions,
        slots=batch.slots,
        query_start=batch.query_start,
        context_lens=batch.context_lens,
        block_tables=batch.block_tables,
    )


class _Packer:
    """Reads matrix after matrix and has each packed, so that few are held twice."""

    def __init__(
        self,
        library: CpuLibrary,
        config: DecoderConfig,
        dtype: torch.dtype,
        reader: WeightReader,
        threads: PackingThreads,
    ) -> None:
        self._library = library
        self._config = config
        self._dtype = dtype
        self._reader = reader
        self._threads = threads

    def model(self) -> CpuWeights:
        config = self._config
        head, embedding = self._head()
        return CpuWeights(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            norm_epsilon=config.norm_epsilon,
            frequencies=inverse_frequencies(
                config.head_dim, config.rope_type, config.rope_parameters
            ).contiguous(),
            layers=[self._layer(index) for index in range(config.num_layers)],
            final_norm=self._norm("model.norm", config.hidden_size),
            head=head,
            embedding=embedding,
        )

    def _head(self) -> tuple[PackedLinear, torch.Tensor | None]:
        """The head, and the embedding where that is another matrix."""
        config, reader = self._config, self._reader
        shape = (config.vocab_size, config.hidden_size)
        head = PackedLinear(self._library, config.hidden_size, config.vocab_size, dtype=self._dtype)
        name = "model.embed_tokens.weight"
        # Some checkpoints say they are not tied and store no head of their own.
        if config.is_tied or "lm_head.weight" not in reader:
            self._threads.pack(head, [Part(reader.borrow(name, *shape))])
            return head, None
        self._threads.pack(head, [Part(reader.borrow("lm_head.weight", *shape))])
        return head, reader.read(name, *shape)

    def _layer(self, index: int) -> CpuLayer:
        config = self._config
        prefix = f"model.layers.{index}"
        heads_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        query_norm = key_norm = None
        if config.has_qk_norm:
            query_norm = self._norm(f"{prefix}.self_attn.q_norm", config.head_dim)
            key_norm = self._norm(f"{prefix}.self_attn.k_norm", config.head_dim)
        return CpuLayer(
            attention_norm=self._norm(f"{prefix}.input_layernorm", config.hidden_size),
            query_norm=query_norm,
            key_norm=key_norm,
            feed_forward_norm=self._norm(f"{prefix}.post_attention_layernorm", config.hidden_size),
            query_key_value=self._stacked(
                config.hidden_size,
                [
                    (f"{prefix}.self_attn.q_proj", heads_size),
                    (f"{prefix}.self_attn.k_proj", kv_size),
                    (f"{prefix}.self_attn.v_proj", kv_size),
                ],
            ),
            attention_output=self._stacked(
                heads_size, [(f"{prefix}.self_attn.o_proj", config.hidden_size)]
            ),
            gate_up=self._gated(f"{prefix}.mlp"),
            down=self._stacked(
                config.intermediate_size, [(f"{prefix}.mlp.down_proj", config.hidden_size)]
            ),
            window=config.windows[index] or 0,
        )

    def _stacked(self, num_in: int, parts: list[tuple[str, int]]) -> PackedLinear:
        """Several matrices one below the other, as one layer."""
        linear = PackedLinear(
            self._library,
            num_in,
            sum(num_out for _, num_out in parts),
            dtype=self._dtype,
            has_bias=f"{parts[0][0]}.bias" in self._reader,
        )
        read: list[Part] = []
        first_out = 0
        for path, num_out in parts:
            read.append(self._part(linear, path, num_in, num_out, first_out=first_out))
            first_out += num_out
        self._threads.pack(linear, read)
        return linear

    def _gated(self, prefix: str) -> PackedLinear:
        config = self._config
        linear = PackedLinear(
            self._library,
            config.hidden_size,
            config.intermediate_size,
            dtype=self._dtype,
            gated=True,
            has_bias=f"{prefix}.gate_proj.bias" in self._reader,
        )
        sizes = config.hidden_size, config.intermediate_size
        parts = [
            self._part(linear, f"{prefix}.{name}", *sizes, part=part)
            for name, part in (("gate_proj", GATE), ("up_proj", UP))
        ]
        self._threads.pack(linear, parts)
        return linear

    def _part(
        self,
        linear: PackedLinear,
        path: str,
        num_in: int,
        num_out: int,
        *,
        first_out: int = 0,
        part: int = GATE,
    ) -> Part:
        weight = self._reader.borrow(f"{path}.weight", num_out, num_in)
        bias = None
        if linear.shape.has_bias:
            bias = self._reader.read(f"{path}.bias", num_out).float()
        return Part(weight, bias, first_out, part)

    def _norm(self, path: str, size: int) -> torch.Tensor:
        return self._reader.read(f"{path}.weight", size).float()
