"""Packs the layers of a model on several threads while the next ones are read.

    reads in order:   head ─▶ layer 0 ─▶ layer 1 ─▶ …        one thread, whoever loads
    packs:              └──▶ [threads] ◀──┘                  one layer on one thread

A layer is packed by one thread, so no two write into the same memory, and the kernels work without
the interpreter lock. Weights that lie in a mapped file come in from disk here, too.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

import torch

from pageframe.kernels.cpu.linear import GATE, PackedLinear


class Part(NamedTuple):
    """Some outputs of a layer, not packed yet: weights ``[n, num_in]`` and a bias ``[n]``."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    first_out: int = 0
    part: int = GATE


class PackingThreads:
    """Packs layers beside one another; a context manager, which waits for all of them.

    Args:
        num_threads: How many layers are packed at a time. One more at most has been read, since its
            weights may be copies.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="pack")
        self._packing: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._wait_until(0)

    def pack(self, linear: PackedLinear, parts: Sequence[Part]) -> None:
        """Pack all parts of a layer, now or later; waits while there is too much to do.

        Raises:
            PageframeError: whatever packing this or an earlier layer raises.
        """
        self._wait_until(self._num_threads)
        self._packing.append(self._threads.submit(_pack, linear, parts))

    def _wait_until(self, num_left: int) -> None:
        while len(self._packing) > num_left:
            self._packing.popleft().result()


def _pack(linear: PackedLinear, parts: Sequence[Part]) -> None:
    for weight, bias, first_out, part in parts:
        linear.pack(weight, first_out=first_out, part=part)
        if bias is not None:
            linear.pack_bias(bias, first_out=first_out, part=part)
