"""Buffers that are filled anew in every step but allocated once.

On a CPU a fresh large tensor costs a page fault for every 4 KiB of it, which is more than the
work done in it; see the measurement in ``ops/paged_attention.py``.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Scratch:
    """Named buffers of one dtype on one device; each grows to the largest size asked for.

    A plain ``torch.empty`` per call would do the same, slower. Two tensors taken under one name
    share memory, so a name belongs to one place in the code.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._buffers: dict[str, torch.Tensor] = {}
        # What was taken last: mostly it is asked for again, and to cut it anew costs far more.
        self._taken: dict[str, torch.Tensor] = {}

    @contextmanager
    def apart(self, buffers: dict[str, torch.Tensor]) -> Iterator[None]:
        """Take from ``buffers`` for a while, which is filled as needed.

        What a CUDA graph has recorded stays where it was, however large other steps become.
        """
        own, self._buffers = self._buffers, buffers
        self._taken.clear()
        try:
            yield
        finally:
            self._buffers = own
            self._taken.clear()

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """A contiguous tensor of ``shape`` with undefined content.

        Valid until the same name is taken again.
        """
        taken = self._taken.get(name)
        if taken is not None and taken.shape == shape:
            return taken
        num_elements = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_elements:
            # Powers of two: a sequence that grows by one block a step must not allocate each time.
            capacity = 1 << max(num_elements - 1, 0).bit_length()
            buffer = torch.empty(capacity, dtype=self.dtype, device=self.device)
            self._buffers[name] = buffer
        taken = self._taken[name] = buffer[:num_elements].view(shape)
        return taken
