"""Recording what a function launches on a GPU, to launch it again as one CUDA graph.

Kept apart and thin, because nothing here runs without a GPU: tests record with a recorder of their
own that runs the same launches over the same memory.
"""

from collections.abc import Callable
from typing import Protocol

import torch

# PyTorch's advice: libraries choose algorithms and allocate in first calls, which a capture must
# not see.
_NUM_WARM_UPS = 2


class Recorder(Protocol):
    """Turns a function into what it launches."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run ``function``, and return what does its work on the device once more, at each call.

        The work is done over the same memory with the same sizes. What ``function`` allocates and
        drops may be reused by others of the same recorder; so no two are to be on their way at a
        time, but one behind the other on one stream.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory; the largest should come first.

    Args:
        device: Where the functions launch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """See ``Recorder.record``; launches beside the current stream, and joins it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_NUM_WARM_UPS):
                function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what they do on streams of their own.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            function()
        replay: Callable[[], None] = graph.replay
        return replay
