"""What a step tells a device, in memory that stays: filled in place, sent in one copy.

    host    | field | field | ... | tail, as long as this step needs |        two of these, in turns
               │ one copy
    device  | field | field | ... | tail                             |        one, at one address

A plain way is a fresh tensor for each input of each step, sent by itself: a dozen allocations and
copies of a few hundred bytes, and addresses that a CUDA graph cannot know. Here nothing is made
after the start. Two buffers on the host, because a copy may still be reading the one of the step
before while the next is written.

What comes back, one token of each sequence, takes the same way backwards (``TokenReturn``).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pageframe.core.units import ceil_div
from pageframe.executor.model.device_order import host_memory, make_marker

Int32Array = NDArray[np.int32]

# Fields begin at multiples of this: kernels are compiled anew for other alignments.
_ALIGNMENT_BYTES = 64
_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}
_NUM_BUFFERS = 2


class DeviceInputs:
    """Named arrays of fixed capacity and a tail of int32, on the host and on a device.

    Args:
        fields: Type and capacity of each array, by name.
        tail_capacity: Numbers that the tail has room for.
        device: Where they are sent to.
    """

    def __init__(
        self,
        fields: Mapping[str, tuple[type[np.generic], int]],
        tail_capacity: int,
        device: torch.device,
    ) -> None:
        self._places: dict[str, tuple[np.dtype[Any], int, int]] = {}
        end = 0
        for name, (kind, capacity) in fields.items():
            dtype = np.dtype(kind)
            num_bytes = dtype.itemsize * capacity
            self._places[name] = (dtype, end, end + num_bytes)
            end += ceil_div(num_bytes, _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._tail_start = end
        num_bytes = end + tail_capacity * np.dtype(np.int32).itemsize
        self._device_bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._buffers = [host_memory(num_bytes, device) for _ in range(_NUM_BUFFERS)]
        self._arrays = [buffer.numpy() for buffer in self._buffers]
        self._copied = [make_marker(device) for _ in range(_NUM_BUFFERS)]
        self._turn = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that this takes on the device."""
        return int(self._device_bytes.nbytes)

    def begin(self) -> None:
        """Turn to the other buffer; waits for the copy out of it, the one before the last."""
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        self._copied[self._turn].wait()

    def host(self, name: str) -> NDArray[Any]:
        """A field on the host, shape (capacity,), to be written between ``begin`` and ``send``."""
        dtype, start, end = self._places[name]
        field: NDArray[Any] = self._arrays[self._turn][start:end].view(dtype)
        return field

    def host_tail(self, count: int) -> Int32Array:
        """The first ``count`` numbers of the tail on the host, to be written likewise."""
        tail: Int32Array = self._arrays[self._turn][self._tail_start :].view(np.int32)[:count]
        return tail

    def device(self, name: str) -> torch.Tensor:
        """A field on the device, shape (capacity,); always the same memory."""
        dtype, start, end = self._places[name]
        return self._device_bytes[start:end].view(_DTYPES[dtype])

    def device_tail(self, count: int) -> torch.Tensor:
        """The first ``count`` numbers of the tail on the device."""
        return self._device_bytes[self._tail_start :].view(torch.int32)[:count]

    def send(self, num_tail: int) -> None:
        """Copy all fields and ``num_tail`` numbers of the tail; the host does not wait for that."""
        end = self._tail_start + num_tail * np.dtype(np.int32).itemsize
        self._device_bytes[:end].copy_(self._buffers[self._turn][:end], non_blocking=True)
        self._copied[self._turn].set()


class TokenReturn:
    """Tokens on their way from a device; at most two batches at a time.

    Args:
        capacity: Most tokens of one batch.
        device: Where they come from.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        num_bytes = capacity * np.dtype(np.int32).itemsize
        self._buffers = [
            host_memory(num_bytes, device).view(torch.int32) for _ in range(_NUM_BUFFERS)
        ]
        self._arrived = [make_marker(device) for _ in range(_NUM_BUFFERS)]
        self._turn = 0

    def fetch(self, tokens: torch.Tensor) -> "ComingTokens":
        """Begin to copy ``tokens``, int32 [K], to the host, behind what makes them."""
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        buffer, arrived = self._buffers[self._turn][: len(tokens)], self._arrived[self._turn]
        buffer.copy_(tokens, non_blocking=True)
        arrived.set()
        return ComingTokens(self, self._turn, len(tokens))

    def take(self, turn: int, count: int) -> Int32Array:
        """Wait for the batch of a turn; a copy of it."""
        self._arrived[turn].wait()
        tokens: Int32Array = self._buffers[turn][:count].numpy().copy()
        return tokens


class ComingTokens:
    """A batch of a ``TokenReturn``; to be waited for before the batch after the next is fetched."""

    __slots__ = ("_count", "_source", "_turn")

    def __init__(self, source: TokenReturn, turn: int, count: int) -> None:
        self._source = source
        self._turn = turn
        self._count = count

    def wait(self) -> Int32Array:
        """The tokens, int32 [K]."""
        return self._source.take(self._turn, self._count)
