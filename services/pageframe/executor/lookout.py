"""A thread that waits for steps under way, so that the step thread may hear of plans meanwhile."""

import contextlib
import queue
import threading
from collections.abc import Callable


class Lookout:
    """Waits for one step after another, and says when each is over.

    The thread is there from the first step on that has to be waited for.

    Args:
        tell: Called on that thread with the number of each step that is over.
    """

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._steps: queue.SimpleQueue[tuple[int, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def watch(self, number: int, wait: Callable[[], None]) -> None:
        """Call ``wait``, and then tell ``number``."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)
            self._thread.start()
        self._steps.put((number, wait))

    def close(self) -> None:
        """End the thread, behind the steps that it was given; returns at once."""
        self._steps.put(None)

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            number, wait = step
            # Whoever collects the step hears of what went wrong in it.
            with contextlib.suppress(Exception):
                wait()
            self._tell(number)
