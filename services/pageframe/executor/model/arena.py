"""The KV arena: one reserved address range that holds every block of the pool.

    blocks   uint8 [num_blocks_max, block_bytes]

    ├── in the pool ──────────────┼── reserved addresses, no memory ──┤
    0                        num_blocks                        num_blocks_max

``resize`` moves the border. Layers are views over the whole range, so they outlive it.
"""

import torch
from numpy import int64
from numpy.typing import NDArray

from pageframe.core.errors import ResourceExhaustedError, UnimplementedError
from pageframe.executor.model.host_memory import HEADROOM_BYTES, available_memory_bytes
from pageframe.executor.model.pool_checks import check_block_data, check_block_id, check_pool_size
from pageframe.executor.model.reserved_range import ReservedRange
from pageframe.kernels.layouts import SCALE_DTYPE, KvLayout
from pageframe.kernels.ops.copy_blocks import copy_blocks

_SLICE_BYTES = 2 << 20


class KvArena:
    """All blocks of a pool in one tensor of bytes, laid out as ``kernels.layouts`` draws it.

    On a CPU the range is an anonymous mapping: a page takes memory only once it is written, and
    single pages can be given back without moving the others. A plain tensor could do neither; on
    a GPU there is one, and the arena stays as large as it was made.

    Attributes:
        layout: Sizes of a block, and the element type.
        num_blocks: Blocks in the pool.
        num_blocks_max: Most blocks that it can be given.
        device: Where the blocks are.
        blocks: uint8, shape (num_blocks_max, block_bytes).
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        device: torch.device,
        *,
        num_blocks_max: int = 0,
        promised_bytes: int = 0,
    ) -> None:
        """Reserve the range.

        Args:
            layout: Sizes of a block, and the element type.
            num_blocks: Blocks to start with.
            device: Where to put them.
            num_blocks_max: Most blocks that ``resize`` may ask for; 0 for ``num_blocks``, as it
                always is on a GPU.
            promised_bytes: What somebody else has been promised of the same memory and has not
                taken yet: a host tier in main memory.

        Raises:
            ResourceExhaustedError: KV_ARENA_TOO_LARGE; ``num_blocks`` blocks do not fit into the
                memory that is available beside what is promised, or there are not even addresses
                for ``num_blocks_max``.
        """
        can_resize = device.type == "cpu"
        self.layout = layout
        self.num_blocks = num_blocks
        self.num_blocks_max = (num_blocks_max or num_blocks) if can_resize else num_blocks
        self.device = device
        self._range: ReservedRange | None = None
        # Memory has been taken for so many bytes from the first.
        self._num_bytes_taken = 0
        assert 0 < num_blocks <= self.num_blocks_max, f"{num_blocks} of {num_blocks_max} blocks"
        self._check_fits(num_blocks, promised_bytes)
        num_bytes = self.num_blocks_max * layout.block_bytes
        if can_resize:
            try:
                self._range = ReservedRange(num_bytes)
            except MemoryError as error:
                raise _no_addresses(self.num_blocks_max, num_bytes) from error
            flat = torch.frombuffer(self._range.buffer, dtype=torch.uint8)
        else:
            flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.blocks = flat.view(self.num_blocks_max, layout.block_bytes)
        self._payload = (
            self.blocks[:, : layout.num_elements_per_block * layout.dtype.itemsize]
            .view(layout.dtype)
            .view(self.num_blocks_max, *layout.block_shape)
        )
        self._scales = self._scale_views()

    @property
    def resident_bytes(self) -> int:
        """Bytes of the arena that are in memory, in whole pages."""
        return self.blocks.nbytes if self._range is None else self._range.resident_bytes

    def layer(self, index: int) -> torch.Tensor:
        """Payload of one layer, of ``layout.dtype``; strided, see ``kernels.layouts``.

        Returns:
            shape (num_blocks_max, 2, block_size, num_kv_heads, head_dim).
        """
        return self._payload[:, index]

    def scales(self, index: int) -> torch.Tensor | None:
        """Scales of one layer; None unless the layout is quantised.

        Returns:
            float32, shape (num_blocks_max, 2, block_size, num_kv_heads), strided.
        """
        return None if self._scales is None else self._scales[:, index]

    def copy(self, sources: NDArray[int64], targets: NDArray[int64]) -> None:
        """Copy whole blocks; all sources are read before any target is written.

        Args:
            sources: int64, shape (C,).
            targets: int64, shape (C,), none twice.
        """
        copy_blocks(self.blocks, torch.from_numpy(sources), torch.from_numpy(targets))

    def read(self, block_id: int) -> bytes:
        """Everything that a block holds, scales and padding included.

        Raises:
            OutOfRangeError: BLOCK_OUT_OF_RANGE.
        """
        check_block_id(block_id, self.num_blocks)
        return bytes(self.blocks[block_id].cpu().numpy().data)

    def write(self, block_id: int, data: bytes) -> None:
        """Make a block hold what ``read`` gave.

        Raises:
            OutOfRangeError: BLOCK_OUT_OF_RANGE.
            InvalidRequestError: BLOCK_BYTES_INVALID.
        """
        check_block_id(block_id, self.num_blocks)
        check_block_data(data, self.layout.block_bytes)
        # A copy, because tensors cannot be made over what must not be written.
        self.blocks[block_id].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def take_memory(self, num_blocks: int) -> bool:
        """Take memory for a little of what the first ``num_blocks`` blocks have not taken yet.

        A little is a large page: 0.2 ms, and 5 where a virtual machine gets it from its host only
        now. A step that is the first to write there would take so long instead.

        Returns:
            Whether there is more.
        """
        if self._range is None:
            return False
        num_bytes = min(num_blocks, self.num_blocks) * self.layout.block_bytes
        end = min(self._num_bytes_taken + _SLICE_BYTES, num_bytes)
        if end <= self._num_bytes_taken or not self._range.take_memory(self._num_bytes_taken, end):
            return False
        self._num_bytes_taken = end
        return end < num_bytes

    def resize(self, num_blocks: int, *, promised_bytes: int = 0) -> None:
        """Give the pool more blocks or fewer; those below ``num_blocks`` keep their content.

        Memory goes back in whole pages, so a part of one may stay. Blocks that come (again) hold
        zeros or what they held before.

        Args:
            num_blocks: Blocks from now on.
            promised_bytes: As in the constructor.

        Raises:
            UnimplementedError: RESIZE_UNAVAILABLE; the arena is on a GPU.
            OutOfRangeError: POOL_SIZE_OUT_OF_RANGE.
            ResourceExhaustedError: KV_ARENA_TOO_LARGE; memory does not suffice for growing.
        """
        if self._range is None:
            raise UnimplementedError(
                "RESIZE_UNAVAILABLE", f"a pool on {self.device} keeps the size it was started with"
            )
        check_pool_size(num_blocks, self.num_blocks_max)
        if num_blocks > self.num_blocks:
            self._check_fits(num_blocks, promised_bytes)
        else:
            num_bytes = num_blocks * self.layout.block_bytes
            self._range.release(num_bytes)
            self._num_bytes_taken = min(self._num_bytes_taken, num_bytes)
        self.num_blocks = num_blocks

    def _scale_views(self) -> torch.Tensor | None:
        """All scales, shape (num_blocks_max, num_layers, 2, block_size, num_kv_heads)."""
        layout = self.layout
        if not layout.is_quantised:
            return None
        start = layout.payload_bytes_per_block
        scales = self.blocks[:, start : start + layout.scale_bytes_per_block].view(SCALE_DTYPE)
        return scales.view(self.num_blocks_max, *layout.block_shape[:-1])

    def _check_fits(self, num_blocks: int, promised_bytes: int) -> None:
        """Whether ``num_blocks`` blocks may take what they have not taken yet."""
        taken_bytes = 0 if self._range is None else self._range.resident_bytes
        needed_bytes = max(0, num_blocks * self.layout.block_bytes - taken_bytes)
        if self.device.type == "cpu":
            available_bytes = available_memory_bytes()
        else:
            available_bytes = torch.cuda.mem_get_info(self.device)[0]
        if needed_bytes + promised_bytes + HEADROOM_BYTES > available_bytes:
            raise ResourceExhaustedError(
                "KV_ARENA_TOO_LARGE",
                f"{num_blocks} blocks take {needed_bytes / 2**20:.0f} MiB more and {self.device} "
                f"has {available_bytes / 2**20:.0f} MiB left, of which {HEADROOM_BYTES >> 20} MiB "
                f"are kept and {promised_bytes / 2**20:.0f} MiB are promised to a host tier or "
                "to steps; ask for fewer blocks, a smaller kv dtype, a smaller host tier or a "
                "smaller token budget",
                needed_bytes=needed_bytes,
                promised_bytes=promised_bytes,
                available_bytes=available_bytes,
                num_blocks=num_blocks,
            )


def _no_addresses(num_blocks_max: int, num_bytes: int) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        "KV_ARENA_TOO_LARGE",
        f"there are no addresses for the {num_bytes / 2**20:.0f} MiB of {num_blocks_max} blocks; "
        "let the pool grow less",
        needed_bytes=num_bytes,
        num_blocks=num_blocks_max,
    )
