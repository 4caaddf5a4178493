"""Linear layers on packed weights: the Python side of ``csrc/linear.h``."""

import ctypes

import torch

from pageframe.kernels.cpu.library import (
    DTYPE_BF16,
    DTYPE_F32,
    CpuLibrary,
    LinearCall,
    LinearShape,
    Pool,
    check,
)

DTYPES = {torch.float32: DTYPE_F32, torch.bfloat16: DTYPE_BF16}
_TORCH_DTYPES = {code: dtype for dtype, code in DTYPES.items()}
GATE, UP = 0, 1
_STORE, _ADD = 0, 1


class PackedLinear:
    """``y = x W^T + b``, or ``silu(x G^T) * (x U^T)`` when gated, with weights in packed form.

    The packed form takes as many bytes as the weights do, outputs rounded up to whole panels;
    matrices are packed one at a time and need not be kept.
    """

    def __init__(
        self,
        library: CpuLibrary,
        num_in: int,
        num_out: int,
        *,
        dtype: torch.dtype = torch.float32,
        gated: bool = False,
        has_bias: bool = False,
    ) -> None:
        """Get memory for a layer; all weights are 0 until they are packed.

        Args:
            library: Whose packed form it is: it depends on the instruction set.
            num_in: Inputs.
            num_out: Outputs; of a gated layer those of the result.
            dtype: Of the weights in memory, float32 or bfloat16.
            gated: Whether there are a gate and an up matrix.
            has_bias: Whether there is a bias, one for each matrix.
        """
        self._functions = library.functions
        self.shape = LinearShape(num_in, num_out, DTYPES[dtype], gated, has_bias, 0)
        num_bytes = self._functions.pf_linear_packed_bytes(ctypes.byref(self.shape))
        check(num_bytes)
        self.memory = library.allocate(num_bytes)
        self.row_dtype = _TORCH_DTYPES[library.row_dtype(self.shape.dtype)]

    def pack(self, weight: torch.Tensor, *, first_out: int = 0, part: int = GATE) -> None:
        """Pack rows ``[first_out, first_out + n)``.

        Args:
            weight: ``[n, num_in]``, float32 or bfloat16, channels of a row side by side.
            first_out: Where the first row goes.
            part: ``GATE`` or ``UP``; 0 for a layer that is not gated.
        """
        assert weight.stride(1) == 1 or weight.shape[1] == 1, f"strides {weight.stride()}"
        assert weight.shape[1] == self.shape.num_in, f"{weight.shape[1]} inputs"
        code = self._functions.pf_linear_pack_rows(
            ctypes.byref(self.shape),
            self.memory.address,
            part,
            first_out,
            len(weight),
            weight.data_ptr(),
            DTYPES[weight.dtype],
            weight.stride(0) if len(weight) > 1 else self.shape.num_in,
        )
        check(code)

    def pack_bias(self, bias: torch.Tensor, *, first_out: int = 0, part: int = GATE) -> None:
        """Pack the bias of outputs ``[first_out, first_out + n)``; float32 ``[n]``."""
        assert bias.dtype == torch.float32, bias.dtype
        assert bias.is_contiguous(), f"strides {bias.stride()}"
        code = self._functions.pf_linear_pack_bias(
            ctypes.byref(self.shape),
            self.memory.address,
            part,
            first_out,
            len(bias),
            bias.data_ptr(),
        )
        check(code)

    def __call__(self, pool: Pool, x: torch.Tensor, y: torch.Tensor, *, add: bool = False) -> None:
        """Compute ``y = f(x)``, or ``y = y + f(x)``.

        Each row's bits depend on that row alone: not on its neighbours, their number or threads.

        Args:
            pool: Who computes.
            x: Rows of ``row_dtype``, ``[n, num_in]``; rows may lie apart.
            y: ``[n, num_out]``, float32 or bfloat16 (float32 for ``add``); no overlap with ``x``.
            add: Whether to add to what is in ``y``.

        Raises:
            InternalError: ``KERNEL_ARGUMENT`` for sizes, strides or dtypes that cannot be.
        """
        call = LinearCall(
            shape=self.shape,
            packed=self.memory.address,
            x=x.data_ptr(),
            y=y.data_ptr(),
            num_rows=len(x),
            x_stride=_row_stride(x, self.shape.num_in),
            y_stride=_row_stride(y, self.shape.num_out),
            x_dtype=DTYPES[x.dtype],
            y_dtype=DTYPES[y.dtype],
            epilogue=_ADD if add else _STORE,
        )
        assert len(x) == len(y), f"{len(x)} rows in, {len(y)} rows out"
        check(self._functions.pf_linear(pool.handle, ctypes.byref(call)))


def _row_stride(rows: torch.Tensor, width: int) -> int:
    """Elements from a row to the next; -1, which a kernel refuses, if rows cannot be read so."""
    if rows.dim() != 2 or rows.shape[1] != width or (rows.stride(1) != 1 and width > 1):
        return -1
    return rows.stride(0) if len(rows) > 1 else width
