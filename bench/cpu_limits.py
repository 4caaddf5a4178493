"""What a CPU can do at most: fused multiply-adds, and reading memory with some threads at once.

Each thread reads a part of its own. All wait until the last is there, and time runs from then on
until the last is done, so that starting threads does not count. With one thread its own time
counts, which does not run while another process has the core.
"""

import ctypes
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageframe.kernels.cpu import build, compiler, isa
from pageframe.kernels.cpu.library import CpuLibrary, address_of, declare

BATCH_BYTES = 768
"""What is read goes by so many bytes: twelve cache lines."""
_NUM_READ_BYTES = BATCH_BYTES * 40_000
_NUM_PARTS = 8
_FLOPS_ROUNDS = 20_000

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p
_THREADS = (_POINTER, ctypes.c_int32, _POINTER)
_PROTOTYPES = {
    "limits_gflops": (ctypes.c_double, (_I64,)),
    "limits_read": (ctypes.c_double, (_POINTER, *_THREADS)),
    "limits_read_pieces": (ctypes.c_double, (_POINTER, _POINTER, _I64, *_THREADS)),
}


class Read(NamedTuple):
    """Memory was read.

    Attributes:
        seconds: From the common start until the last thread was done; one thread's own time.
        totals: Sum of the floats that each thread has read.
    """

    seconds: float
    totals: tuple[float, ...]


class Limits:
    """Peak arithmetic of one thread, and memory bandwidth of some.

    Attributes:
        num_threads: How many read at once.
        gflops: GFLOP/s of one thread, the best so far.
        gbytes: GB/s of all threads together, from end to end, the best so far.
    """

    def __init__(self, library: CpuLibrary, num_threads: int = 1) -> None:
        assert num_threads >= 1, f"{num_threads} threads"
        self.num_threads = num_threads
        self._functions = _compiled(library.isa)
        self._memory = library.allocate(_NUM_PARTS * _NUM_READ_BYTES)
        ctypes.memset(self._memory.address, 1, self._memory.num_bytes)
        self._part = 0
        self.gflops = 0.0
        self.gbytes = 0.0

    def measure(self) -> float:
        """Look once more; the best counts. Returns this look's GB/s."""
        self._part = (self._part + 1) % _NUM_PARTS
        read = self.read(self._memory.address + self._part * _NUM_READ_BYTES, _NUM_READ_BYTES)
        gbytes = _NUM_READ_BYTES / read.seconds / 1e9
        self.gbytes = max(self.gbytes, gbytes)
        self.gflops = max(self.gflops, self._functions.limits_gflops(_FLOPS_ROUNDS))
        return gbytes

    def read(self, address: int, num_bytes: int) -> Read:
        """Reads memory from end to end, a part for each thread.

        Args:
            address: Where it begins.
            num_bytes: How much; a multiple of 768.
        """
        assert num_bytes % BATCH_BYTES == 0, f"{num_bytes} bytes"
        starts = starts_of_parts(num_bytes // BATCH_BYTES, self.num_threads) * BATCH_BYTES
        return self._read(self._functions.limits_read, starts, address)

    def read_pieces(self, address: int, places: NDArray[np.int64], piece_bytes: int) -> Read:
        """Reads pieces that lie anywhere, in their order, a part of them for each thread.

        Args:
            address: What places count from.
            places: Bytes from there to each piece.
            piece_bytes: Size of each; a multiple of 768.
        """
        assert piece_bytes % BATCH_BYTES == 0, f"pieces of {piece_bytes} bytes"
        starts = starts_of_parts(len(places), self.num_threads)
        where = address_of(places, np.int64)
        return self._read(self._functions.limits_read_pieces, starts, address, where, piece_bytes)

    def _read(self, function: Any, starts: NDArray[np.int64], *what: int) -> Read:
        totals = np.zeros(self.num_threads, np.float32)
        to = address_of(totals, np.float32)
        seconds = function(*what, address_of(starts, np.int64), self.num_threads, to)
        return Read(seconds, tuple(totals.tolist()))


def starts_of_parts(num_items: int, num_parts: int) -> NDArray[np.int64]:
    """Where each of some even parts begins, and at last where all end; int64 [num_parts + 1]."""
    return np.arange(num_parts + 1, dtype=np.int64) * num_items // num_parts


@cache
def _compiled(isa_name: str) -> ctypes.CDLL:
    source = Path(__file__).parent / "cpu_limits.cpp"
    (chosen,) = (known for known in isa.known() if known.name == isa_name)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "limits.so"
        flags = [*chosen.compiler_flags, f"-I{build.SOURCE_DIR}"]
        compiler.compile_library(compiler.find_compiler(), [source], flags, target)
        functions = ctypes.CDLL(str(target))
    declare(functions, _PROTOTYPES)
    return functions
