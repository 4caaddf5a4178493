"""Measures what a sequence waits for: one cause at a time, each interval measured (law 9)."""

from dataclasses import dataclass, field

from pageframe.core.request import StallCause

Link = tuple[bytes, int]
"""Trace id and span id of a culprit."""


@dataclass(frozen=True, slots=True)
class Stall:
    """One interval of waiting that is over; ``end_ns > start_ns``."""

    cause: StallCause
    start_ns: int
    end_ns: int
    culprit: Link | None = None


@dataclass(slots=True)
class StallMeter:
    """A stop watch with a cause.

    Attributes:
        cause: What is being waited for; ``None`` while the sequence moves.
        since_ns: When that wait began.
        culprit: The span that caused it, where known.
        stall_ns: Time of the waits that are over, by cause.
    """

    cause: StallCause | None = None
    since_ns: int = 0
    culprit: Link | None = None
    stall_ns: dict[StallCause, int] = field(default_factory=dict)

    def switch(
        self, cause: StallCause | None, at_ns: int, culprit: Link | None = None
    ) -> Stall | None:
        """Wait for ``cause`` from ``at_ns`` on; ``None`` stops. Returns the wait that ended.

        Times come from two machines at worst; one that runs backwards counts as no time.
        """
        if cause is self.cause:
            return None
        ended = None
        if self.cause is not None and at_ns > self.since_ns:
            ended = Stall(self.cause, self.since_ns, at_ns, self.culprit)
            total_ns = self.stall_ns.get(self.cause, 0) + at_ns - self.since_ns
            self.stall_ns[self.cause] = total_ns
        self.since_ns = at_ns if self.cause is None else max(at_ns, self.since_ns)
        self.cause = cause
        self.culprit = culprit
        return ended
