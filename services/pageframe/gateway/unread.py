"""Notices callers that take nothing of what is ready for them.

A caller that stops reading blocks the write of its door, for as long as it likes; its deadline may
be far away, or not be at all. Meanwhile its tokens are computed, and it keeps its places here and
at the scheduler. So patience has an end:

    offer ─▶ door writes ─▶ taken            the usual way, microseconds
    offer ─▶ door writes …………… give up       the caller has read nothing for so long

One timer for a request, set again at most once in the time of patience: an output costs two
assignments.
"""

import asyncio
from collections.abc import Callable

UNREAD_S = 60.0
"""How long an output may wait to be taken, seconds."""


class ReadWatch:
    """Watches one caller; for one event loop.

    Args:
        patience_s: How long an output may wait to be taken, seconds.
        give_up: Called once, when one has waited for longer.
    """

    def __init__(self, patience_s: float, give_up: Callable[[], None]) -> None:
        self._patience_s = patience_s
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._since_s: float | None = None

    def offer(self) -> None:
        """An output is handed to the door."""
        self._since_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._patience_s, self._look)

    def taken(self) -> None:
        """The door is done with it."""
        self._since_s = None

    def close(self) -> None:
        """Watch no longer."""
        self._since_s = None
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._since_s is None:
            return
        left_s = self._since_s + self._patience_s - self._loop.time()
        if left_s <= 0:
            self._give_up()
        else:
            self._timer = self._loop.call_later(left_s, self._look)
