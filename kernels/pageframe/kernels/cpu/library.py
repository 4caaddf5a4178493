"""A library of CPU kernels, loaded; and the choice between one and PyTorch.

The interface is ``csrc/pageframe_cpu.h``. A call gives up Python's lock while it computes; memory
is passed by address, so a caller keeps its arrays and tensors alive until the call returns.
"""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
from numpy.typing import NDArray

from pageframe.core.errors import (
    InternalError,
    InvalidRequestError,
    PageframeError,
    PreconditionError,
    ResourceExhaustedError,
)
from pageframe.kernels.cpu import build
from pageframe.kernels.cpu import isa as isas

ABI_VERSION: Final = 1
AUTO: Final = "auto"
TORCH: Final = "torch"
CHOICES: Final = (AUTO, TORCH, *isas.NAMES)
"""Values of the setting ``cpu-kernels``."""

DTYPE_F32: Final = 0
DTYPE_BF16: Final = 1
DTYPE_INT8: Final = 2

Prototypes = Mapping[str, tuple[Any, Sequence[Any]]]
"""Type of the result and of each argument, by name of a function; for ctypes."""

_LOG = structlog.get_logger(__name__)


class LinearShape(ctypes.Structure):
    """``pf_linear_shape``: what a packed layer is; see ``csrc/linear.h``."""

    _fields_ = (
        ("num_in", ctypes.c_int64),
        ("num_out", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("has_bias", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class LinearCall(ctypes.Structure):
    """``pf_linear_call``: one layer on some rows."""

    _fields_ = (
        ("shape", LinearShape),
        ("packed", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
        ("x_dtype", ctypes.c_int32),
        ("y_dtype", ctypes.c_int32),
        ("epilogue", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SHAPE = ctypes.POINTER(LinearShape)
_PACK = (_I32, _I64, _I64, _POINTER)
_PROTOTYPES: Final = {
    "pf_abi_version": (_I32, ()),
    "pf_num_lanes": (_I32, ()),
    "pf_alloc": (_POINTER, (_I64,)),
    "pf_free": (None, (_POINTER, _I64)),
    "pf_pool_create": (_POINTER, (_I32,)),
    "pf_pool_num_threads": (_I32, (_POINTER,)),
    "pf_pool_destroy": (None, (_POINTER,)),
    "pf_row_dtype": (_I32, (_I32,)),
    "pf_linear_packed_bytes": (_I64, (_SHAPE,)),
    "pf_linear_pack_rows": (_I32, (_SHAPE, _POINTER, *_PACK, _I32, _I64)),
    "pf_linear_pack_bias": (_I32, (_SHAPE, _POINTER, *_PACK)),
    "pf_linear": (_I32, (_POINTER, ctypes.POINTER(LinearCall))),
    "pf_pool_exercise": (_I64, (_POINTER, _I64, _I64, ctypes.POINTER(_I64))),
}


class Memory:
    """Zeroed memory of a library, 64-byte aligned, on huge pages where there are some.

    Attributes:
        address: Where it begins.
        num_bytes: Its size.
    """

    def __init__(self, library: "CpuLibrary", num_bytes: int) -> None:
        address = library.functions.pf_alloc(num_bytes)
        if not address:
            raise ResourceExhaustedError(
                "OUT_OF_MEMORY", f"{num_bytes} bytes are not to be had", num_bytes=num_bytes
            )
        self.address: int = address
        self.num_bytes = num_bytes
        weakref.finalize(self, library.functions.pf_free, address, num_bytes)


class Pool:
    """Threads of a library; the caller's is one of them.

    Attributes:
        handle: The ``pf_pool``.
        num_threads: How many there are: fewer than asked for if the system refuses some.
    """

    def __init__(self, library: "CpuLibrary", num_threads: int) -> None:
        handle = library.functions.pf_pool_create(num_threads)
        if not handle:
            raise InvalidRequestError(
                "NUM_THREADS", f"{num_threads} threads cannot compute", num_threads=num_threads
            )
        self.handle: int = handle
        self.num_threads: int = library.functions.pf_pool_num_threads(handle)
        # Also ends them at interpreter exit, while the library is still mapped.
        self._finalizer = weakref.finalize(self, library.functions.pf_pool_destroy, handle)

    def close(self) -> None:
        """End the threads; the pool may not be used again."""
        self._finalizer()


class CpuLibrary:
    """One loaded library.

    Attributes:
        isa: Name of the instruction set.
        path: Where it was loaded from.
        functions: The library for ctypes, prototypes of what is general set.
        num_lanes: Floats in a vector.
    """

    def __init__(self, isa: str, path: Path) -> None:
        self.isa = isa
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        declare(self.functions, _PROTOTYPES)
        version = self.functions.pf_abi_version()
        assert version == ABI_VERSION, f"{path} speaks version {version}, not {ABI_VERSION}"
        self.num_lanes: int = self.functions.pf_num_lanes()

    def row_dtype(self, weights_dtype: int) -> int:
        """The dtype in which rows enter a linear layer with weights of ``weights_dtype``."""
        return int(self.functions.pf_row_dtype(weights_dtype))

    def create_pool(self, num_threads: int) -> Pool:
        """Start threads.

        Raises:
            InvalidRequestError: ``NUM_THREADS``, for less than one.
        """
        return Pool(self, num_threads)

    def allocate(self, num_bytes: int) -> Memory:
        """Get zeroed memory.

        Raises:
            ResourceExhaustedError: ``OUT_OF_MEMORY``.
        """
        return Memory(self, num_bytes)


def declare(functions: ctypes.CDLL, prototypes: Prototypes) -> None:
    """Tell ctypes the result and the arguments of functions, by name."""
    for name, (result, arguments) in prototypes.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments


def address_of(array: NDArray[Any], dtype: type[np.generic]) -> int:
    """Where an array lies; the caller keeps it."""
    assert array.dtype == dtype, f"{array.dtype}, not {dtype}"
    assert array.flags.c_contiguous, f"strides {array.strides}"
    address: int = array.__array_interface__["data"][0]
    return address


def check(code: int) -> None:
    """Turn the code that a function returned into an error, if it is one.

    Raises:
        InternalError: ``KERNEL_ARGUMENT``: our own code has passed something impossible.
        ResourceExhaustedError: ``OUT_OF_MEMORY``.
    """
    if code == -2:
        raise ResourceExhaustedError("OUT_OF_MEMORY", "a kernel got no memory")
    if code < 0:
        raise InternalError("KERNEL_ARGUMENT", f"a kernel refused its arguments (code {code})")


@cache
def load(isa: str | None = None) -> CpuLibrary:
    """Load the library for an instruction set, compiling it first if need be.

    Args:
        isa: Its name; the best that this machine has unless given.

    Raises:
        PreconditionError: ``NO_COMPILER``, ``COMPILER_FAILED``, ``KERNEL_CACHE_UNUSABLE``,
            ``CPU_TOO_OLD`` or ``KERNELS_UNLOADABLE``.
        InvalidRequestError: ``ISA_UNSUPPORTED`` for a set that this machine does not have.
    """
    usable = {known.name: known for known in isas.usable(isas.cpu_flags())}
    if isa is not None and isa not in usable:
        raise InvalidRequestError(
            "ISA_UNSUPPORTED", f"this machine has no {isa}; it has {', '.join(usable) or 'none'}"
        )
    chosen = usable[isa] if isa else build.best_isa()
    path = build.find_or_build(chosen, _LOG.info)
    try:
        return CpuLibrary(chosen.name, path)
    except OSError as error:
        raise PreconditionError(
            "KERNELS_UNLOADABLE", f"the compiled kernels cannot be loaded: {error}"
        ) from None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which kernels compute on the CPU.

    Attributes:
        library: The compiled ones; None where PyTorch computes.
        reason: Why PyTorch does; empty where it does not.
    """

    library: CpuLibrary | None
    reason: str = ""


def choose(setting: str = AUTO) -> Choice:
    """Decide by the setting ``cpu-kernels``, one of ``CHOICES``.

    ``auto`` never fails: where there is neither a library nor a way to compile one, PyTorch serves
    and the reason is told.

    Raises:
        PageframeError: as ``load``, when one instruction set was asked for by name.
    """
    assert setting in CHOICES, f"{setting} is no choice of CPU kernels"
    if setting == TORCH:
        return Choice(None, "asked for by cpu-kernels=torch")
    if setting != AUTO:
        return Choice(load(setting))
    try:
        return Choice(load())
    except PageframeError as error:
        return Choice(None, error.message)
