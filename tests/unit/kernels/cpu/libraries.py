"""Libraries that tests compute with: every instruction set that this machine can run."""

import pytest

from pageframe.kernels.cpu import isa
from pageframe.kernels.cpu.attention import CpuParts
from pageframe.kernels.cpu.library import CpuLibrary, load
from pageframe.kernels.cpu.model import KV_DTYPES
from pageframe.kernels.cpu.model_abi import ArenaStruct

USABLE = [known.name for known in isa.usable(isa.cpu_flags())]


def loaded(name: str) -> CpuLibrary:
    """The library, or a skipped test where there is no compiler."""
    try:
        return load(name)
    except Exception as error:
        if getattr(error, "reason", "") != "NO_COMPILER":
            raise
        pytest.skip("there is no C++ compiler")


def parts_of(library, pool, place, min_shared_keys=0):
    """Single parts of a step over layer ``place`` of a pool."""
    layout = pool.layout
    arena = ArenaStruct(
        blocks=pool.rows.data_ptr(),
        block_bytes=layout.block_bytes,
        payload_bytes=layout.payload_bytes_per_block,
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=KV_DTYPES[layout.dtype],
    )
    return CpuParts(library, arena, place, min_shared_keys)
