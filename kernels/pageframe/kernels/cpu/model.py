"""A whole model on compiled CPU kernels: one call per step. The Python side of ``csrc/model.h``.

What is passed are addresses: of packed weights, of the pool, of the step's tables. Nothing is
converted or copied, so a step costs Python a struct and a call.
"""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.core.errors import InternalError
from pageframe.kernels.cpu.draw import Choice
from pageframe.kernels.cpu.library import (
    DTYPE_BF16,
    DTYPE_F32,
    DTYPE_INT8,
    CpuLibrary,
    Memory,
    Pool,
    address_of,
    check,
    declare,
)
from pageframe.kernels.cpu.linear import PackedLinear
from pageframe.kernels.cpu.model_abi import (
    PROTOTYPES,
    ArenaStruct,
    ConfigStruct,
    LayerStruct,
    LinearWeights,
    StepStruct,
)
from pageframe.kernels.layouts import KvLayout
from pageframe.kernels.scratch import Scratch

KV_DTYPES: Final = {
    torch.float32: DTYPE_F32,
    torch.bfloat16: DTYPE_BF16,
    torch.int8: DTYPE_INT8,
}
"""Types of a pool that the kernels read and write."""
HEAD_DIM_MULTIPLE: Final = 8
"""Channels of a head are a multiple of this."""
PHASES: Final = (
    "embedding",
    "norm",
    "query_key_value",
    "rotary_and_write",
    "attention",
    "attention_output",
    "gate_up",
    "down",
)
"""What ``CpuModel.phase_ns`` counts, in the order of ``pf_phase``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuLayer:
    """Weights of one layer; D is the head size. Norms are float32.

    Attributes:
        attention_norm: shape (hidden_size,).
        query_norm: shape (D,); None where heads are not normalised.
        key_norm: likewise.
        feed_forward_norm: shape (hidden_size,).
        query_key_value: hidden_size to (num_heads + 2 * num_kv_heads) * D.
        attention_output: num_heads * D to hidden_size.
        gate_up: Gated, hidden_size to the intermediate size.
        down: Back.
        window: Positions that a token sees, itself included; 0 for all.
    """

    attention_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    feed_forward_norm: torch.Tensor
    query_key_value: PackedLinear
    attention_output: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuWeights:
    """A model: its layers and what stands before and behind them.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Channels per head, a multiple of ``HEAD_DIM_MULTIPLE``.
        norm_epsilon: Added to the mean square in RMSNorm.
        frequencies: float32, shape (head_dim / 2,), rotary angle per position.
        layers: The layers.
        final_norm: float32, shape (hidden_size,).
        head: hidden_size to the vocabulary.
        embedding: float32 or bfloat16, shape (vocabulary, hidden_size); None where it is ``head``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    frequencies: torch.Tensor
    layers: Sequence[CpuLayer]
    final_norm: torch.Tensor
    head: PackedLinear
    embedding: torch.Tensor | None


class CpuArena:
    """A pool as the kernels see it, and where in its blocks each layer is.

    Args:
        blocks: uint8, shape (num_blocks, block_bytes), on the CPU.
        layout: Of a block, which has the layers of one group.
        places: Group of each layer, and its place in the blocks of the group.
        num_groups: Groups, which take turns in the block tables.
    """

    def __init__(
        self,
        blocks: torch.Tensor,
        layout: KvLayout,
        places: Sequence[tuple[int, int]],
        num_groups: int,
    ) -> None:
        self.num_groups = num_groups
        self.groups = np.array([group for group, _ in places], np.int32)
        self.places = np.array([place for _, place in places], np.int32)
        self._blocks = blocks
        self.struct = ArenaStruct(
            blocks=blocks.data_ptr(),
            block_bytes=layout.block_bytes,
            payload_bytes=layout.payload_bytes_per_block,
            block_size=layout.block_size,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            dtype=KV_DTYPES[layout.dtype],
        )


@dataclass(frozen=True, slots=True)
class CpuStep:
    """Tables of one step: T new tokens of S sequences, G groups of layers.

    Attributes:
        token_ids: int32 [T].
        positions: int32 [T].
        slots: int64 [T * G]; groups take turns.
        query_start: int32 [S + 1].
        context_lens: int32 [S].
        block_tables: int32 [S, W * G]; groups take turns.
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int64]
    query_start: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]


class _Floats:
    """What NumPy makes an array of: the array keeps this, and this the memory."""

    def __init__(self, memory: Memory, count: int) -> None:
        self._memory = memory
        self.__array_interface__ = {
            "version": 3,
            "shape": (count,),
            "typestr": np.dtype(np.float32).str,
            "data": (memory.address, False),
        }


class _FloatMemory:
    """Memory of a library for one float32 matrix, which is another one at each call.

    It grows to the largest size asked for. To allocate tens of megabytes anew in a step costs a
    page fault for every 4 KiB of them, and here they lie on huge pages.
    """

    def __init__(self, library: CpuLibrary) -> None:
        self._library = library
        self._floats = torch.empty(0)
        self._matrix = self._floats.view(0, 0)

    def take(self, num_rows: int, num_columns: int) -> torch.Tensor:
        """A contiguous matrix with undefined content, valid until the next call.

        Raises:
            ResourceExhaustedError: OUT_OF_MEMORY.
        """
        if self._matrix.shape == (num_rows, num_columns):
            return self._matrix
        count = num_rows * num_columns
        if self._floats.numel() < count:
            # Powers of two: a batch that is a little larger than all before must not allocate anew.
            capacity = 1 << (count - 1).bit_length()
            memory = self._library.allocate(capacity * np.dtype(np.float32).itemsize)
            self._floats = torch.from_numpy(np.asarray(_Floats(memory, capacity)))
        self._matrix = self._floats[:count].view(num_rows, num_columns)
        return self._matrix


class CpuModel:
    """A Llama-shaped model whose steps are one call each.

    Attributes:
        phase_ns: int64, one entry for each of ``PHASES``: wall time so far, all layers together;
            None, and then nothing is measured, until ``measure`` is called.
    """

    def __init__(self, library: CpuLibrary, pool: Pool, weights: CpuWeights) -> None:
        """Take weights, which stay where they are."""
        self._functions = library.functions
        declare(self._functions, PROTOTYPES)
        self._pool = pool
        self._weights = weights
        self._hidden_size = int(weights.final_norm.shape[0])
        self._vocab_size = int(weights.head.shape.num_out)
        self._scratch = Scratch(torch.float32, torch.device("cpu"))
        self._logits = _FloatMemory(library)
        self.phase_ns: NDArray[np.int64] | None = None
        handle = self._functions.pf_model_create(ctypes.byref(_config(weights, self._hidden_size)))
        if not handle:
            raise InternalError("KERNEL_ARGUMENT", "the kernels refused the sizes of the model")
        self._handle: int = handle
        weakref.finalize(self, self._functions.pf_model_destroy, handle)

    def measure(self) -> None:
        """Begin to count ``phase_ns``, from zero."""
        self.phase_ns = np.zeros(len(PHASES), np.int64)

    def forward(self, arena: CpuArena, step: CpuStep, rows: torch.Tensor) -> torch.Tensor:
        """Run all layers; keys and values of the new tokens are in the pool afterwards.

        Args:
            arena: The pool.
            step: Tables.
            rows: int64, shape (R,), tokens whose output is wanted.

        Returns:
            Normalised hidden states, float32, shape (R, hidden_size); valid until the next call.

        Raises:
            InternalError: KERNEL_ARGUMENT; a token id is outside the vocabulary, or the pool is
                one of another model.
            ResourceExhaustedError: OUT_OF_MEMORY.
        """
        outputs, call = self._prepare(arena, step, rows)
        if len(step.token_ids):
            check(self._functions.pf_forward(self._pool.handle, self._handle, ctypes.byref(call)))
        return outputs

    def prepare_decode(
        self,
        arena: CpuArena,
        step: CpuStep,
        rows: torch.Tensor,
        prepare_choice: Callable[[torch.Tensor], Choice],
    ) -> tuple[Callable[[], None], Choice]:
        """Make a step ready that goes from tokens to the next ones in one call.

        Tokens of ``step`` may be written until it is run. Its outputs and logits are where those of
        ``forward`` and ``logits`` are.

        Args:
            arena: The pool.
            step: Tables, of one token at least.
            rows: int64, shape (R,), tokens whose output is wanted; one at least.
            prepare_choice: Says how to choose from logits, float32 (R, vocabulary), to come.

        Returns:
            What runs it, and raises as ``forward`` and ``logits`` do; and what is chosen then.
        """
        outputs, call = self._prepare(arena, step, rows)
        choice = prepare_choice(self._logits.take(rows.shape[0], self._vocab_size))
        kept = (arena, step, rows, outputs)

        def run() -> None:
            assert kept, "what the call has addresses of"
            pool, model = self._pool.handle, self._handle
            step_call, choose_call = ctypes.byref(call), ctypes.byref(choice.struct)
            check(self._functions.pf_decode(pool, model, step_call, choose_call))

        return run, choice

    def _prepare(
        self, arena: CpuArena, step: CpuStep, rows: torch.Tensor
    ) -> tuple[torch.Tensor, StepStruct]:
        """Where outputs will be, and the call; the caller keeps what it is given."""
        outputs = self._scratch.take("outputs", rows.shape[0], self._hidden_size)
        assert step.block_tables.strides[1] == step.block_tables.itemsize, "a table lies apart"
        call = StepStruct(
            arena=ctypes.pointer(arena.struct),
            layer_groups=address_of(arena.groups, np.int32),
            layer_places=address_of(arena.places, np.int32),
            token_ids=address_of(step.token_ids, np.int32),
            positions=address_of(step.positions, np.int32),
            slots=address_of(step.slots, np.int64),
            query_start=address_of(step.query_start, np.int32),
            context_lens=address_of(step.context_lens, np.int32),
            block_tables=step.block_tables.__array_interface__["data"][0],
            rows=rows.data_ptr(),
            outputs=outputs.data_ptr(),
            phase_ns=None if self.phase_ns is None else address_of(self.phase_ns, np.int64),
            num_tokens=len(step.token_ids),
            num_sequences=len(step.context_lens),
            num_rows=rows.shape[0],
            table_entries=step.block_tables.strides[0] // step.block_tables.itemsize,
            num_groups=arena.num_groups,
        )
        return outputs, call

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits of rows of ``forward``'s result.

        Returns:
            float32, shape (R, vocabulary); valid until the next call.

        Raises:
            ResourceExhaustedError: OUT_OF_MEMORY.
        """
        logits = self._logits.take(outputs.shape[0], self._vocab_size)
        if outputs.shape[0]:
            rows = outputs.contiguous()
            check(
                self._functions.pf_logits(
                    self._pool.handle,
                    self._handle,
                    rows.data_ptr(),
                    rows.shape[0],
                    logits.data_ptr(),
                )
            )
        return logits


def _config(weights: CpuWeights, hidden_size: int) -> ConfigStruct:
    """The model in C's words; the caller keeps ``weights``, whose addresses it holds."""
    layers = (LayerStruct * len(weights.layers))(*map(_layer, weights.layers))
    embedding = weights.embedding
    is_bf16 = embedding is not None and embedding.dtype == torch.bfloat16
    return ConfigStruct(
        hidden_size=hidden_size,
        num_layers=len(weights.layers),
        num_heads=weights.num_heads,
        num_kv_heads=weights.num_kv_heads,
        head_dim=weights.head_dim,
        norm_epsilon=weights.norm_epsilon,
        score_scale=weights.head_dim**-0.5,
        frequencies=_vector(weights.frequencies),
        final_norm=_vector(weights.final_norm),
        layers=layers,
        head=_linear(weights.head),
        embedding=None if embedding is None else embedding.data_ptr(),
        embedding_dtype=DTYPE_BF16 if is_bf16 else DTYPE_F32,
    )


def _layer(layer: CpuLayer) -> LayerStruct:
    return LayerStruct(
        attention_norm=_vector(layer.attention_norm),
        query_norm=None if layer.query_norm is None else _vector(layer.query_norm),
        key_norm=None if layer.key_norm is None else _vector(layer.key_norm),
        feed_forward_norm=_vector(layer.feed_forward_norm),
        query_key_value=_linear(layer.query_key_value),
        attention_output=_linear(layer.attention_output),
        gate_up=_linear(layer.gate_up),
        down=_linear(layer.down),
        window=layer.window,
    )


def _linear(linear: PackedLinear) -> LinearWeights:
    return LinearWeights(shape=linear.shape, packed=linear.memory.address)


def _vector(values: torch.Tensor) -> int:
    assert values.dtype == torch.float32, values.dtype
    assert values.is_contiguous(), f"strides {values.stride()}"
    address: int = values.data_ptr()
    return address
