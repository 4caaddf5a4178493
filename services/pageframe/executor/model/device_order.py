"""Waiting for a device where that is needed: points in its work, and memory that it reads."""

from typing import Protocol

import torch


class Marker(Protocol):
    """A point in what a device has been told to do."""

    def set(self) -> None:
        """Stand behind all that has been launched so far."""
        ...

    def wait(self) -> None:
        """Return when the device has passed the point; at once if it was never set."""
        ...


class _HostMarker:
    """On a CPU everything is done when its call returns."""

    def set(self) -> None:
        """See ``Marker.set``."""

    def wait(self) -> None:
        """See ``Marker.wait``."""


class _CudaMarker:
    """An event on the current stream of the thread that sets it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()

    def set(self) -> None:
        """See ``Marker.set``."""
        self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """See ``Marker.wait``."""
        self._event.synchronize()


def make_marker(device: torch.device) -> Marker:
    """A marker in the work of ``device``."""
    return _CudaMarker(device) if device.type == "cuda" else _HostMarker()


def host_memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes on the host, zeros, that copies from or to ``device`` may touch meanwhile."""
    return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
