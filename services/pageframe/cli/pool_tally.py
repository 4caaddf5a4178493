"""How often each operation happens, counted from a watch on a thread of its own."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Self

from pageframe.client.kv_memory import KvMemoryClient, OperationWatch
from pageframe.core.errors import PageframeError
from pageframe.core.trace import KvOperation
from pageframe.wire.memory_facts import OperationBatch

WINDOW_S: Final = 5.0
"""Rates are those of the last five seconds."""

_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Operations per second.

    Attributes:
        total: Of all operations.
        by_operation: Of each that happened at all, the most frequent first.
        num_lost: Operations that were not seen, since the beginning.
    """

    total: float = 0.0
    by_operation: dict[KvOperation, float] = field(default_factory=dict)
    num_lost: int = 0


class Tally:
    """Counts operations within a window of time; may be used by several threads."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._lock = threading.Lock()
        self._start_s = now_s()
        self._batches: deque[tuple[float, Counter[KvOperation]]] = deque()
        self._counts: Counter[KvOperation] = Counter()
        self._num_lost = 0

    def add(self, batch: OperationBatch) -> None:
        """Count operations that happened just now."""
        counts = Counter(record.operation for record in batch.operations)
        with self._lock:
            self._batches.append((self._now_s(), counts))
            self._counts += counts
            self._num_lost += batch.num_lost

    def rates(self) -> Rates:
        """Operations per second within the window, or since the beginning if that is later."""
        now_s = self._now_s()
        with self._lock:
            while self._batches and self._batches[0][0] < now_s - WINDOW_S:
                self._counts -= self._batches.popleft()[1]
            window_s = min(WINDOW_S, max(now_s - self._start_s, 0.001))
            by_operation = {
                operation: count / window_s for operation, count in self._counts.most_common()
            }
            return Rates(
                total=self._counts.total() / window_s,
                by_operation=by_operation,
                num_lost=self._num_lost,
            )


class WatchingTally(Tally):
    """A tally that watches by itself while it is open; begins anew when the executor comes back."""

    def __init__(self, client: KvMemoryClient) -> None:
        super().__init__()
        self._client = client
        self._watch: OperationWatch | None = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._is_closed.set()
        watch = self._watch
        if watch is not None:
            watch.close()
        # Not for ever: an executor that does not answer must not keep a person from leaving.
        self._thread.join(_RETRY_S)

    def _run(self) -> None:
        while not self._is_closed.is_set():
            try:
                self._watch = self._client.watch()
                if self._is_closed.is_set():
                    # Closed before there was a watch that could be closed.
                    self._watch.close()
                for batch in self._watch:
                    self.add(batch)
            except PageframeError:
                # The executor is away. The view says so by itself; here it is waited for.
                self._is_closed.wait(_RETRY_S)
