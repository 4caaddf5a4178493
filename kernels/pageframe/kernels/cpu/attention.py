"""Single parts of a step on compiled CPU kernels: paged attention and KV write, by themselves.

Steps run them inside ``CpuModel.forward``; here tests and benches call them.
"""

import ctypes
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.kernels.cpu.library import DTYPE_F32, CpuLibrary, Pool, check, declare
from pageframe.kernels.cpu.model_abi import ArenaStruct

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SHARED_TILE_FIELDS: Final = 6


class AttentionCall(ctypes.Structure):
    """``pf_attention_call``."""

    _fields_ = (
        ("arena", ctypes.POINTER(ArenaStruct)),
        ("queries", _POINTER),
        ("mixed", _POINTER),
        ("query_start", _POINTER),
        ("context_lens", _POINTER),
        ("block_tables", _POINTER),
        ("num_sequences", _I64),
        ("table_entries", _I64),
        ("num_groups", _I64),
        ("group", _I64),
        ("place", _I64),
        ("num_places", _I64),
        ("num_heads", _I64),
        ("window", _I64),
        ("mixed_dtype", _I32),
        ("min_shared_keys", _I32),
    )


_PROTOTYPES: Final = {
    "pf_attention": (_I32, (_POINTER, ctypes.POINTER(AttentionCall))),
    "pf_kv_write": (
        _I32,
        (ctypes.POINTER(ArenaStruct), _I64, _I32, _POINTER, _I64, _POINTER),
    ),
    "pf_exp": (None, (_POINTER, _I64, _POINTER)),
}


@dataclass(frozen=True, slots=True)
class SharedTile:
    """Keys that several sequences share, taken in once for some of them.

    Attributes:
        keys: Positions [first, end).
        heads: KV heads [first, end).
        tokens: Of the batch.
    """

    keys: tuple[int, int]
    heads: tuple[int, int]
    tokens: tuple[int, ...]


class CpuParts:
    """Parts of a step over one pool.

    Args:
        library: Compiled kernels.
        arena: The pool; whoever has its memory keeps it.
        place: Which layer of a block.
        min_shared_keys: How many keys sequences must share to take them in together; 0 for as
            many as in a step of a model.
    """

    def __init__(
        self, library: CpuLibrary, arena: ArenaStruct, place: int, min_shared_keys: int = 0
    ) -> None:
        self._functions = library.functions
        declare(self._functions, _PROTOTYPES)
        self._arena = arena
        self._place = place
        self._min_shared_keys = min_shared_keys

    def write(self, side: int, slots: NDArray[np.int64], channels: torch.Tensor) -> None:
        """Put keys (``side`` 0) or values (1) into slots.

        Args:
            side: Which.
            slots: int64 [T].
            channels: float32, shape (T, num_kv_heads, head_dim), contiguous.
        """
        code = self._functions.pf_kv_write(
            ctypes.byref(self._arena),
            self._place,
            side,
            slots.ctypes.data,
            len(slots),
            channels.data_ptr(),
        )
        check(code)

    def attend(
        self,
        pool: Pool,
        query: torch.Tensor,
        *,
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        scale: float,
        window: int | None = None,
        group: int = 0,
        num_groups: int = 1,
        num_layers: int = 1,
    ) -> torch.Tensor:
        """Causal attention of new tokens; arguments as in ``kernels.reference.paged_attention``.

        Args:
            pool: Who computes.
            query: float32, shape (T, num_heads, head_dim).
            query_start: int32 [S + 1].
            context_lens: int32 [S].
            block_tables: int32 [S, W * num_groups], contiguous; groups of layers take turns.
            scale: Multiplies scores before the softmax.
            window: Positions that a token sees, itself included; None for all.
            group: Whose tables.
            num_groups: Groups of layers.
            num_layers: From this one on, with the same queries: one after the other as in a step.

        Returns:
            float32, shape (num_layers * T, num_heads, head_dim).
        """
        scaled = (query * scale).contiguous()
        mixed = scaled.new_empty(num_layers * len(scaled), *scaled.shape[1:])
        call = self._call(
            query_start, context_lens, block_tables, window, group=group, num_groups=num_groups
        )
        call.queries, call.mixed = scaled.data_ptr(), mixed.data_ptr()
        call.num_heads, call.num_places = query.shape[1], num_layers
        check(self._functions.pf_attention(pool.handle, ctypes.byref(call)))
        return mixed

    def shared_tiles(
        self,
        *,
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        num_heads: int,
        num_threads: int = 1,
        window: int | None = None,
        group: int | None = 0,
        num_groups: int = 1,
    ) -> list[SharedTile]:
        """What ``attend`` takes in once for several sequences; arguments as there.

        Args:
            query_start: int32 [S + 1].
            context_lens: int32 [S].
            block_tables: int32 [S, W * num_groups].
            num_heads: Query heads.
            num_threads: Of the pool.
            window: Positions that a token sees, itself included; None for all.
            group: Whose tables; None for layers of all groups.
            num_groups: Groups of layers.

        Returns:
            Shared tiles in the order in which threads take them.
        """
        place = -1 if group is None else group
        call = self._call(
            query_start, context_lens, block_tables, window, group=place, num_groups=num_groups
        )
        call.num_heads = num_heads
        function = self._functions.pf_attention_shared_tiles
        function.restype = _I64
        function.argtypes = (ctypes.POINTER(AttentionCall), _I64, _I64, _POINTER, _POINTER)
        members: NDArray[np.int64] = np.zeros(int(query_start[-1]), np.int64)

        def fill(tiles: NDArray[np.int64]) -> int:
            byref = ctypes.byref(call)
            addresses = tiles.ctypes.data, members.ctypes.data
            return int(function(byref, num_threads, len(tiles), *addresses))

        none: NDArray[np.int64] = np.zeros((0, _SHARED_TILE_FIELDS), np.int64)
        tiles: NDArray[np.int64] = np.zeros((fill(none), _SHARED_TILE_FIELDS), np.int64)
        fill(tiles)
        return [
            SharedTile((key, end_key), (head, end_head), tuple(members[first:end].tolist()))
            for key, end_key, head, end_head, first, end in tiles.tolist()
        ]

    def _call(
        self,
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        window: int | None,
        *,
        group: int,
        num_groups: int,
    ) -> AttentionCall:
        """A call without its queries."""
        return AttentionCall(
            arena=ctypes.pointer(self._arena),
            query_start=query_start.ctypes.data,
            context_lens=context_lens.ctypes.data,
            block_tables=block_tables.ctypes.data,
            num_sequences=len(context_lens),
            table_entries=block_tables.shape[1],
            num_groups=num_groups,
            group=group,
            place=self._place,
            window=window or 0,
            mixed_dtype=DTYPE_F32,
            min_shared_keys=self._min_shared_keys,
        )


def exp_below_one(library: CpuLibrary, x: torch.Tensor) -> torch.Tensor:
    """Powers of e, of non-positive numbers, as the softmax has them; float32, contiguous."""
    declare(library.functions, _PROTOTYPES)
    to = torch.empty_like(x)
    library.functions.pf_exp(x.data_ptr(), x.numel(), to.data_ptr())
    return to
