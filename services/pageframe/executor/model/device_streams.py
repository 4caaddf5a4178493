"""CUDA streams and launches for ``swap_copies``: each method is one call of PyTorch or a kernel."""

from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy import int64
from numpy.typing import NDArray

from pageframe.executor.model.swap_copies import NUM_BUFFERS, SwapCopies, buffer_rows
from pageframe.kernels.ops.move_rows import move_rows


class DeviceStream:
    """A ``swap_copies.Stream``.

    Args:
        device: A CUDA device.
        stream: None for whichever is current when a method is called: the one that steps run on.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._stream = stream

    def record(self) -> torch.cuda.Event:
        """See ``swap_copies.Stream``."""
        return self._own().record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        """See ``swap_copies.Stream``."""
        self._own().wait_event(event)

    def running(self) -> AbstractContextManager[object]:
        """See ``swap_copies.Stream``."""
        scope: AbstractContextManager[object] = torch.cuda.stream(self._own())
        return scope

    def _own(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self._device)


class DeviceMover:
    """A ``swap_copies.Mover`` of Triton's kernel and the device's copy engines."""

    def move_rows(
        self,
        source: torch.Tensor,
        source_rows: NDArray[int64],
        target: torch.Tensor,
        target_rows: NDArray[int64],
    ) -> None:
        """See ``swap_copies.Mover``."""
        # Pinned, because a copy from other memory would have this thread wait for the stream.
        pairs = torch.from_numpy(np.stack([source_rows, target_rows])).pin_memory()
        ids = pairs.to(source.device, non_blocking=True)
        move_rows(source, ids[0], target, ids[1])

    def send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """See ``swap_copies.Mover``."""
        target.copy_(source, non_blocking=True)


def device_copies(slots: torch.Tensor, device: torch.device) -> SwapCopies:
    """Copies between ``device`` and pinned ``slots``, uint8 (num_slots, block_bytes).

    Raises:
        torch.OutOfMemoryError: staging does not fit onto the device.
    """
    num_slots, block_bytes = slots.shape
    rows = buffer_rows(num_slots, block_bytes)
    return SwapCopies(
        slots,
        [
            torch.empty(rows, block_bytes, dtype=torch.uint8, device=device)
            for _ in range(NUM_BUFFERS)
        ],
        compute=DeviceStream(device),
        copies=DeviceStream(device, torch.cuda.Stream(device)),
        mover=DeviceMover(),
    )
