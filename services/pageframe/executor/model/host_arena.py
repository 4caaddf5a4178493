"""The host tier's bytes: slots in main memory, each of which holds one whole block."""

import torch
from numpy import int64
from numpy.typing import NDArray

from pageframe.core.errors import ResourceExhaustedError
from pageframe.executor.model.block_rows import copy_rows
from pageframe.executor.model.host_memory import HEADROOM_BYTES, available_memory_bytes
from pageframe.executor.model.pool_checks import check_block_data, check_host_slot
from pageframe.executor.model.reserved_range import ReservedRange
from pageframe.executor.model.swap_copies import SwapCopies, staging_bytes


class HostArena:
    """Host slots as rows of bytes; which slot holds what is known elsewhere.

    Beside a pool in main memory, the slots are a reserved range: a slot takes memory once it is
    stored to. Beside one on a GPU they are pinned, and all of their memory is taken at once,
    because only from and to pinned memory can the device copy by itself; it does so beside the
    steps, in the order that ``swap_copies`` keeps.

    Attributes:
        num_slots: Slots; may be 0.
        block_bytes: Bytes of one slot.
        slots: uint8, shape (num_slots, block_bytes).
    """

    def __init__(self, num_slots: int, block_bytes: int, device: torch.device) -> None:
        """Reserve the slots.

        Args:
            num_slots: Slots; 0 for no host tier.
            block_bytes: Bytes of one block.
            device: Where the blocks are.

        Raises:
            ResourceExhaustedError: HOST_TIER_TOO_LARGE.
        """
        assert num_slots >= 0, f"{num_slots} host slots"
        self.num_slots = num_slots
        self.block_bytes = block_bytes
        self._device = device
        self._range: ReservedRange | None = None
        num_bytes = num_slots * block_bytes
        available_bytes = available_memory_bytes()
        if num_slots and num_bytes + HEADROOM_BYTES > available_bytes:
            raise _too_large(num_slots, num_bytes, available_bytes)
        try:
            if device.type == "cpu":
                self._range = ReservedRange(num_bytes)
                flat = torch.frombuffer(self._range.buffer, dtype=torch.uint8)[:num_bytes]
            else:
                flat = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=num_bytes > 0)
            self.slots = flat.view(num_slots, block_bytes)
            self._copies = self._device_copies()
        except torch.OutOfMemoryError as error:
            raise _no_staging(num_slots, block_bytes, device) from error
        except (MemoryError, RuntimeError) as error:
            raise _too_large(num_slots, num_bytes, available_bytes) from error

    @property
    def untouched_bytes(self) -> int:
        """Bytes that slots have not taken yet and still may."""
        if self._range is None:
            return 0
        return max(0, self.num_slots * self.block_bytes - self._range.resident_bytes)

    def store(self, blocks: torch.Tensor, sources: NDArray[int64], slots: NDArray[int64]) -> None:
        """Copy blocks to slots.

        On a GPU the copies are queued, and the blocks may be written by what is queued next.

        Args:
            blocks: uint8, shape (num_blocks, block_bytes), an arena's.
            sources: int64, shape (O,), blocks.
            slots: int64, shape (O,), none twice.
        """
        if self._copies is None:
            copy_rows(blocks, sources, self.slots, slots)
        else:
            self._copies.store(blocks, sources, slots)

    def load(
        self,
        blocks: torch.Tensor,
        slots: NDArray[int64],
        targets: NDArray[int64],
        *,
        settles: bool = True,
    ) -> None:
        """Copy slots to blocks; the other way round.

        Args:
            blocks: uint8, shape (num_blocks, block_bytes), an arena's.
            slots: int64, shape (I,).
            targets: int64, shape (I,), blocks, none twice.
            settles: Whether what is queued next may read the blocks. If not, the copies of a GPU
                run beside it, and ``settle`` comes before anything that reads or moves the blocks.
        """
        if self._copies is None:
            copy_rows(self.slots, slots, blocks, targets)
            return
        self._copies.load(blocks, slots, targets)
        if settles:
            self._copies.settle()

    def settle(self) -> None:
        """What is queued from now on may read and move all blocks that were loaded."""
        if self._copies is not None:
            self._copies.settle()

    def finish(self) -> None:
        """Have this thread wait until all copies that were queued have been made."""
        if self._copies is not None:
            self._copies.finish()

    def read(self, slot: int) -> bytes:
        """What a slot holds, once the copies that were queued before have been made.

        Raises:
            OutOfRangeError: HOST_SLOT_OUT_OF_RANGE.
        """
        check_host_slot(slot, self.num_slots)
        self.finish()
        return bytes(self.slots[slot].numpy().data)

    def write(self, slot: int, data: bytes) -> None:
        """Make a slot hold ``data``, once the copies that were queued before have been made.

        Raises:
            OutOfRangeError: HOST_SLOT_OUT_OF_RANGE.
            InvalidRequestError: BLOCK_BYTES_INVALID.
        """
        check_host_slot(slot, self.num_slots)
        check_block_data(data, self.block_bytes)
        self.finish()
        memoryview(self.slots[slot].numpy())[:] = data

    def _device_copies(self) -> SwapCopies | None:
        """Who copies beside steps; None beside a pool in main memory, or without slots."""
        if self._device.type != "cuda" or not self.num_slots:
            return None
        # Late, because Triton is there only where there is a GPU.
        from pageframe.executor.model.device_streams import device_copies

        return device_copies(self.slots, self._device)


def _too_large(num_slots: int, num_bytes: int, available_bytes: int) -> ResourceExhaustedError:
    return ResourceExhaustedError(
        "HOST_TIER_TOO_LARGE",
        f"{num_slots} host slots take {num_bytes / 2**20:.0f} MiB and the machine has "
        f"{available_bytes / 2**20:.0f} MiB left, of which {HEADROOM_BYTES >> 20} MiB are kept; "
        "ask for a smaller host tier",
        needed_bytes=num_bytes,
        available_bytes=available_bytes,
        num_slots=num_slots,
    )


def _no_staging(num_slots: int, block_bytes: int, device: torch.device) -> ResourceExhaustedError:
    needed_bytes = staging_bytes(num_slots, block_bytes)
    return ResourceExhaustedError(
        "HOST_TIER_TOO_LARGE",
        f"a host tier of {num_slots} slots needs {needed_bytes / 2**20:.0f} MiB of {device} for "
        "copies on their way, and there are none left; ask for fewer blocks or for no host tier",
        needed_bytes=needed_bytes,
        num_slots=num_slots,
    )
