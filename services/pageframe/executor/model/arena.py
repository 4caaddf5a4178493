"""The KV arena: one reserved address range that holds every block of the pool."""

import mmap

import torch

from pageframe.core.errors import ResourceExhaustedError
from pageframe.executor.model.host_memory import available_memory_bytes
from pageframe.kernels.layouts import KvLayout
from pageframe.kernels.ops.copy_blocks import copy_blocks

# What must stay free beside the arena: activations, gather buffers, the interpreter itself.
_HEADROOM_BYTES = 128 * 1024 * 1024


class KvArena:
    """All blocks of a pool in one tensor, laid out as ``kernels.layouts`` draws it.

    On a CPU the range is an anonymous mapping: a page takes memory only once it is written, and
    single pages can be given back without moving the others. A plain tensor could do neither.

    Attributes:
        layout: Sizes.
        num_blocks: Blocks in the arena.
        blocks: shape (num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim).
    """

    def __init__(
        self, layout: KvLayout, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Reserve the range.

        Raises:
            ResourceExhaustedError: it does not fit into the memory that is available.
        """
        assert num_blocks > 0, f"an arena of {num_blocks} blocks"
        self.layout = layout
        self.num_blocks = num_blocks
        num_elements = num_blocks * layout.num_elements_per_block
        num_bytes = num_elements * dtype.itemsize
        _check_fits(num_bytes, num_blocks, device)
        if device.type == "cpu":
            mapping = mmap.mmap(-1, num_bytes)
            flat = torch.frombuffer(mapping, dtype=dtype)
        else:
            flat = torch.empty(num_elements, dtype=dtype, device=device)
        self.blocks = flat.view(num_blocks, *layout.block_shape)

    def layer(self, index: int) -> torch.Tensor:
        """View of one layer, shape (num_blocks, 2, block_size, num_kv_heads, head_dim)."""
        return self.blocks[:, index]

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy whole blocks over all layers; all sources are read before any target is written."""
        copy_blocks(self.blocks, sources, targets)


def _check_fits(num_bytes: int, num_blocks: int, device: torch.device) -> None:
    if device.type == "cpu":
        available_bytes = available_memory_bytes()
    else:
        available_bytes = torch.cuda.mem_get_info(device)[0]
    if num_bytes + _HEADROOM_BYTES > available_bytes:
        raise ResourceExhaustedError(
            "KV_ARENA_TOO_LARGE",
            f"{num_blocks} blocks take {num_bytes / 2**20:.0f} MiB and {device} has "
            f"{available_bytes / 2**20:.0f} MiB left, of which {_HEADROOM_BYTES >> 20} MiB are "
            "kept; ask for fewer blocks or a smaller kv dtype",
            needed_bytes=num_bytes,
            available_bytes=available_bytes,
            num_blocks=num_blocks,
        )
