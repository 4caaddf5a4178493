"""Those who watch operations on blocks: each reads the log at its own pace.

    step thread: log.flush ─▶ on_operations ──one wake at a time──▶ event loop: all watchers read on

A watcher is a number, the next operation that it wants. Nothing is queued for it: one that does not
read costs the batch that waits to be sent, and later learns how many operations it has lost.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

from pageframe.core.errors import ResourceExhaustedError, UnavailableError
from pageframe.executor.operation_log import OperationLog
from pageframe.executor.step_history import StepHistory
from pageframe.executor.step_thread import StepThread
from pageframe.wire.memory_facts import OperationBatch

NUM_WATCHERS_MAX: Final = 64
"""How many may watch at the same time; each costs an encoding of its own."""


class Watchers:
    """All watchers of one log. Used on the event loop.

    Args:
        log: What they watch; its ``on_operations`` is set only while there are watchers.
        steps: Whose steps they hear of; its ``on_result`` is set only while there are watchers.
        loop: The event loop.

    Attributes:
        history: Steps since somebody watches.
    """

    def __init__(
        self, log: OperationLog, steps: StepThread, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.history = StepHistory()
        self._log = log
        self._steps = steps
        self._loop = loop
        self._num_watchers = 0
        self._news = asyncio.Event()
        self._is_waking = False
        self._is_closed = False

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Be one of the watchers while the block runs.

        Raises:
            ResourceExhaustedError: reason WATCHERS_FULL.
        """
        if self._num_watchers >= NUM_WATCHERS_MAX:
            raise ResourceExhaustedError(
                "WATCHERS_FULL",
                f"{self._num_watchers} watch already; at most {NUM_WATCHERS_MAX} may",
                num_watchers=self._num_watchers,
                num_watchers_max=NUM_WATCHERS_MAX,
            )
        self._num_watchers += 1
        self._log.on_operations = self._on_operations
        self._steps.on_result = self.history.take
        try:
            yield
        finally:
            self._num_watchers -= 1
            if not self._num_watchers:
                self._log.on_operations = None
                self._steps.on_result = None

    async def read(self, first_number: int) -> OperationBatch:
        """Operations from ``first_number`` on; waits until there is one.

        Raises:
            UnavailableError: reason DRAINING, once ``close`` was called.
        """
        while not self._is_closed:
            # Taken before the log is read: what comes after that sets it.
            news = self._news
            batch = self._log.read(first_number)
            if batch.operations:
                return batch
            await news.wait()
        raise UnavailableError("DRAINING", "the executor is stopping; watch again later")

    def close(self) -> None:
        """End all watches."""
        self._is_closed = True
        self._wake()

    def _on_operations(self) -> None:
        # On the step thread, which must not write to the loop's pipe more often than it is read.
        if not self._is_waking and not self._loop.is_closed():
            self._is_waking = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_waking = False
        news, self._news = self._news, asyncio.Event()
        news.set()
