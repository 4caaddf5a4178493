"""Drawing tokens on compiled CPU kernels: the Python side of ``csrc/draw.h``.

What a draw is, and why it is exact, ``executor/model/draw.py`` says, which also has it in PyTorch.
The two draw the same token unless their exponentials round a weight differently right at a border.
"""

import ctypes
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.kernels.cpu.library import CpuLibrary, Memory, Pool, address_of, check, declare

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _DrawCall(ctypes.Structure):
    """``pf_draw_call``."""

    _fields_ = (
        ("logits", _POINTER),
        ("best", _POINTER),
        ("rows", _POINTER),
        ("temperature", _POINTER),
        ("top_k", _POINTER),
        ("top_p", _POINTER),
        ("min_p", _POINTER),
        ("uniforms", _POINTER),
        ("scratch", _POINTER),
        ("num_draws", _I64),
        ("num_columns", _I64),
        ("stride", _I64),
    )


class ChooseStruct(ctypes.Structure):
    """``pf_choose_call``."""

    _fields_ = (
        ("logits", _POINTER),
        ("is_drawn", _POINTER),
        ("rows", _POINTER),
        ("positions", _POINTER),
        ("seeds", _POINTER),
        ("sample_indices", _POINTER),
        ("temperature", _POINTER),
        ("top_k", _POINTER),
        ("top_p", _POINTER),
        ("min_p", _POINTER),
        ("scratch", _POINTER),
        ("maxima", _POINTER),
        ("token_ids", _POINTER),
        ("num_rows", _I64),
        ("num_columns", _I64),
        ("stride", _I64),
    )


_CALL: Final = ctypes.POINTER(_DrawCall)
_PROTOTYPES: Final = {
    "pf_draw_scratch_bytes": (_I64, (_I64,)),
    "pf_draw": (_I32, (_POINTER, _CALL, _POINTER)),
    "pf_total_weights": (_I32, (_POINTER, _CALL, _POINTER)),
    "pf_choose": (_I32, (_POINTER, ctypes.POINTER(ChooseStruct))),
}
_COLUMN_DTYPES: Final[dict[str, type[np.generic]]] = {
    "seeds": np.uint64,
    "sample_indices": np.uint32,
    "temperature": np.float32,
    "top_k": np.int64,
    "top_p": np.float64,
    "min_p": np.float32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawColumns:
    """How to draw for each of R sequences: arrays [R] that stay where they are, and may change.

    Attributes:
        seeds: uint64.
        sample_indices: uint32.
        temperature: float32, above zero where something is drawn, as are the bounds of the others.
        top_k: int64, above zero; as many as there are tokens, or more, keep all.
        top_p: float64, in ``(0, 1]``; 1 keeps all.
        min_p: float32, in ``[0, 1]``; 0 keeps all.
    """

    seeds: NDArray[np.uint64]
    sample_indices: NDArray[np.uint32]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float32]
    _addresses: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        addresses = {
            name: _address(getattr(self, name), dtype, len(self.seeds))
            for name, dtype in _COLUMN_DTYPES.items()
        }
        object.__setattr__(self, "_addresses", addresses)

    @property
    def addresses(self) -> dict[str, int]:
        """Where each of them lies."""
        return self._addresses


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Tokens that are to be chosen.

    Attributes:
        struct: What the kernels are told; the arrays are its own and those that it was made of.
        maxima: float32 [K], the best logits, NaN where a row holds a NaN.
        token_ids: int64 [K].
        kept: What ``struct`` has addresses of.
    """

    struct: ChooseStruct
    maxima: NDArray[np.float32]
    token_ids: NDArray[np.int64]
    kept: tuple[Any, ...]


class CpuDraw:
    """Draws of one caller at a time, each row by one thread of a pool.

    Args:
        library: Compiled kernels.
        pool: Who computes; others may use it meanwhile.
    """

    def __init__(self, library: CpuLibrary, pool: Pool) -> None:
        self._library = library
        self._functions = library.functions
        declare(self._functions, _PROTOTYPES)
        self._pool = pool
        self._scratch: Memory | None = None

    def draw(
        self,
        logits: torch.Tensor,
        maxima: torch.Tensor,
        rows: NDArray[np.int64],
        *,
        temperature: NDArray[np.float32],
        top_k: NDArray[np.int64],
        top_p: NDArray[np.float64],
        min_p: NDArray[np.float32],
        uniforms: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        """Draw n tokens.

        Args:
            logits: float32 [K, V], on the CPU.
            maxima: float32 [K], the best logit of each row, finite.
            rows: int64 [n], which of the K each draw is from.
            temperature: float32 [n], above zero.
            top_k: int64 [n], in ``[1, V]``; V keeps all.
            top_p: float64 [n], in ``(0, 1]``; 1 keeps all.
            min_p: float32 [n], in ``[0, 1]``; 0 keeps all.
            uniforms: float64 [n], in ``[0, 1)``.

        Returns:
            Token ids int64 [n].

        Raises:
            InternalError: ``KERNEL_ARGUMENT``, also where ``maxima`` are none of their rows'.
            ResourceExhaustedError: ``OUT_OF_MEMORY``.
        """
        logits = _contiguous(logits)
        token_ids = np.empty(len(rows), np.int64)
        call = self._call(logits, maxima, rows, temperature)
        call.top_k = _address(top_k, np.int64, len(rows))
        call.top_p = _address(top_p, np.float64, len(rows))
        call.min_p = _address(min_p, np.float32, len(rows))
        call.uniforms = _address(uniforms, np.float64, len(rows))
        pool = self._pool.handle
        check(self._functions.pf_draw(pool, ctypes.byref(call), token_ids.ctypes.data))
        return token_ids

    def best(self, logits: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The highest logit of each row and the lowest token id that has it.

        Args:
            logits: float32 [K, V], on the CPU.

        Returns:
            Maxima float32 [K], NaN where the row holds a NaN, and token ids int64 [K].

        Raises:
            ResourceExhaustedError: ``OUT_OF_MEMORY``.
        """
        return self._choose(self._prepare(logits, {}))

    def choose(
        self,
        logits: torch.Tensor,
        rows: NDArray[np.int32],
        positions: NDArray[np.int32],
        is_drawn: NDArray[np.bool_],
        columns: DrawColumns,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The highest logit of each row, and its next token: the best one or a drawn one.

        Args:
            logits: float32 [K, V], on the CPU.
            rows: int32 [K], which entry of each column is theirs.
            positions: int32 [K], of the tokens; they key random numbers as in ``model.philox``.
            is_drawn: bool [K]; the others get what ``best`` says.
            columns: How to draw.

        Returns:
            Maxima float32 [K], NaN where the row holds a NaN, and token ids int64 [K]. Where the
            best logit is not finite nothing is drawn.

        Raises:
            ResourceExhaustedError: ``OUT_OF_MEMORY``.
        """
        return self._choose(self.prepare(logits, rows, positions, is_drawn, columns))

    def prepare(
        self,
        logits: torch.Tensor,
        rows: NDArray[np.int32],
        positions: NDArray[np.int32],
        is_drawn: NDArray[np.bool_],
        columns: DrawColumns,
    ) -> Choice:
        """What ``choose`` would do, with logits that may not be there yet; arguments as there."""
        count = len(logits)
        return self._prepare(
            logits,
            {
                "rows": _address(rows, np.int32, count),
                "positions": _address(positions, np.int32, count),
                "is_drawn": _address(is_drawn, np.bool_, count),
                **columns.addresses,
            },
            rows,
            positions,
            is_drawn,
            columns,
        )

    def total_weights(
        self,
        logits: torch.Tensor,
        maxima: torch.Tensor,
        rows: NDArray[np.int64],
        *,
        temperature: NDArray[np.float32],
    ) -> NDArray[np.int64]:
        """Sums of all weights of n rows, in parts of 2**-40; arguments and errors as of ``draw``.

        Returns:
            int64 [n].
        """
        logits = _contiguous(logits)
        totals = np.empty(len(rows), np.int64)
        call = self._call(logits, maxima, rows, temperature)
        pool = self._pool.handle
        check(self._functions.pf_total_weights(pool, ctypes.byref(call), totals.ctypes.data))
        return totals

    def _prepare(self, logits: torch.Tensor, terms: dict[str, int], *kept: Any) -> Choice:
        logits = _contiguous(logits)
        num_rows, num_columns = logits.shape
        maxima, token_ids = np.empty(num_rows, np.float32), np.empty(num_rows, np.int64)
        struct = ChooseStruct(
            logits=logits.data_ptr(),
            scratch=self._scratch_for(num_columns),
            maxima=address_of(maxima, np.float32),
            token_ids=address_of(token_ids, np.int64),
            num_rows=num_rows,
            num_columns=num_columns,
            stride=_stride(logits),
            **terms,
        )
        return Choice(struct=struct, maxima=maxima, token_ids=token_ids, kept=(logits, *kept))

    def _choose(self, choice: Choice) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if len(choice.token_ids):
            check(self._functions.pf_choose(self._pool.handle, ctypes.byref(choice.struct)))
        return choice.maxima, choice.token_ids

    def _call(
        self,
        logits: torch.Tensor,
        maxima: torch.Tensor,
        rows: NDArray[np.int64],
        temperature: NDArray[np.float32],
    ) -> _DrawCall:
        """What both calls share; the caller keeps all that is given."""
        num_rows, num_columns = logits.shape
        assert maxima.shape == (num_rows,), f"{tuple(maxima.shape)} maxima of {num_rows} rows"
        assert maxima.dtype == torch.float32, maxima.dtype
        assert maxima.is_contiguous(), f"strides {maxima.stride()}"
        return _DrawCall(
            logits=logits.data_ptr(),
            best=maxima.data_ptr(),
            rows=_address(rows, np.int64, len(rows)),
            temperature=_address(temperature, np.float32, len(rows)),
            scratch=self._scratch_for(num_columns),
            num_draws=len(rows),
            num_columns=num_columns,
            stride=_stride(logits),
        )

    def _scratch_for(self, num_columns: int) -> int:
        num_bytes = self._functions.pf_draw_scratch_bytes(num_columns)
        check(num_bytes)
        num_bytes *= self._pool.num_threads
        if self._scratch is None or self._scratch.num_bytes < num_bytes:
            self._scratch = self._library.allocate(num_bytes)
        return self._scratch.address


def _contiguous(logits: torch.Tensor) -> torch.Tensor:
    """Logits whose columns lie side by side; rows may lie apart."""
    assert logits.dtype == torch.float32, logits.dtype
    assert logits.device.type == "cpu", logits.device
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _stride(logits: torch.Tensor) -> int:
    """Floats from a row to the next; of one row alone PyTorch says anything."""
    stride: int = logits.stride(0) if len(logits) > 1 else logits.shape[1]
    return stride


def _address(array: NDArray[Any], dtype: type[np.generic], length: int) -> int:
    """Where an array of so many entries lies; the caller keeps it."""
    assert array.shape == (length,), f"shape {array.shape}, not {length}"
    return address_of(array, dtype)
