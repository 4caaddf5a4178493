"""Time as an argument: pure code is handed a clock and never asks the system for one."""

import time
from typing import Protocol


class Clock(Protocol):
    """A source of time that may be real, virtual or set by hand."""

    def now_ns(self) -> int:
        """Nanoseconds since the Unix epoch; never steps back within one process."""
        ...


class SystemClock:
    """The machine's clock, steadied: wall time at start plus monotonic time since then.

    Spans of several processes on one machine are drawn on one time axis, so the base is wall
    time; intervals inside one process must never be negative, so the motion is monotonic.
    """

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def now_ns(self) -> int:
        """Nanoseconds since the Unix epoch; never steps back within one process."""
        return self._offset_ns + time.monotonic_ns()


class ManualClock:
    """A clock that moves only when told to; for tests and for virtual time."""

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        """The time last set."""
        return self._now_ns

    def advance_ns(self, delta_ns: int) -> None:
        """Move forward by ``delta_ns``, which must not be negative."""
        assert delta_ns >= 0, f"a clock does not run back: {delta_ns} ns"
        self._now_ns += delta_ns
