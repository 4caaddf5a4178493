"""Measures where a sequence's time goes: what it waits for, and what computes it (law 9).

    submit                                                                     end
      [─ queue ─)[─ executor ─)[─ step ─) gap [─ step ─)[─ kv_full ─)[─ step ─)
         waits: a stop watch      computing    └─ transport: no step ran    computing

Each part is measured by itself. Nothing is filled in, so what the parts do not add up to is there
to be seen: the gateway calls it unexplained.

A sequence that decodes is in every step, so its share of computing is a difference of two totals
(``StepClock``), taken when its run begins and ends: no step touches those that merely go on.
"""

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
class StepClock:
    """Totals over all steps of one executor.

    Attributes:
        busy_ns: Time within steps.
        idle_ns: Time between the end of one step and the start of the next.
        start_ns: When the newest step began.
        end_ns: When it ended; 0 before the first.
    """

    busy_ns: int = 0
    idle_ns: int = 0
    start_ns: int = 0
    end_ns: int = 0

    def land(self, start_ns: int, end_ns: int) -> None:
        """A step ran."""
        if self.end_ns:
            self.idle_ns += max(0, start_ns - self.end_ns)
        self.busy_ns += max(0, end_ns - start_ns)
        self.start_ns, self.end_ns = start_ns, end_ns

    def busy_at(self, at_ns: int) -> int:
        """Time within steps up to the start of the newest step, or up to its end."""
        return self.busy_ns - (self.end_ns - self.start_ns if at_ns <= self.start_ns else 0)


@dataclass(slots=True)
class StallMeter:
    """A stop watch with a cause, and a counter of what was computed.

    Attributes:
        cause: What is being waited for; ``None`` while the sequence moves.
        since_ns: When that wait began; or, while the sequence moves, the end of its last chunk.
        culprit: The span that caused it, where known.
        stall_ns: Time of the waits that are over, by cause.
        compute_ns: Time of the steps that computed something new of it.
        lost_cause: Why it computes again what was computed before.
        num_lost_tokens: How many tokens that are.
        idle_mark_ns: ``StepClock.idle_ns`` when its moving was last counted.
        busy_mark_ns: ``StepClock.busy_ns`` when its decode run was last counted.
    """

    cause: StallCause | None = None
    since_ns: int = 0
    culprit: Link | None = None
    stall_ns: dict[StallCause, int] = field(default_factory=dict)
    compute_ns: int = 0
    lost_cause: StallCause = StallCause.PREEMPTED
    num_lost_tokens: int = 0
    idle_mark_ns: int = 0
    busy_mark_ns: int = 0

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
            self.add(self.cause, at_ns - self.since_ns)
        self.since_ns = at_ns if self.cause is None else max(at_ns, self.since_ns)
        self.cause = cause
        self.culprit = culprit
        return ended

    def add(self, cause: StallCause, waited_ns: int) -> None:
        """Count time that was measured otherwise."""
        if waited_ns > 0:
            self.stall_ns[cause] = self.stall_ns.get(cause, 0) + waited_ns

    def mark(self, clock: StepClock, at_ns: int) -> None:
        """Count from here: the sequence moves from the start or the end of the newest step on."""
        self.idle_mark_ns = clock.idle_ns
        self.busy_mark_ns = clock.busy_at(at_ns)
        self.since_ns = at_ns

    def is_left_out(self, clock: StepClock, at_ns: int) -> bool:
        """Whether a step ran without it since ``mark``, although it waits for nothing known.

        Its plan was made before the result of the step before, and expected it to decode by now.
        """
        return self.cause is None and clock.busy_at(at_ns) > self.busy_mark_ns

    def count_gaps(self, clock: StepClock) -> int:
        """It moved until now; between its steps none ran, for no plan had come. Returns ns."""
        gaps_ns = clock.idle_ns - self.idle_mark_ns
        self.add(StallCause.TRANSPORT, gaps_ns)
        self.idle_mark_ns = clock.idle_ns
        return gaps_ns

    def count_chunk(self, clock: StepClock, start: int) -> StallCause | None:
        """The newest step computed a chunk of it that begins with position ``start``.

        Returns:
            Why that was needed once more, if it was.
        """
        self.count_gaps(clock)
        self.mark(clock, clock.end_ns)
        step_ns = clock.end_ns - clock.start_ns
        if start < self.num_lost_tokens:
            self.add(self.lost_cause, step_ns)
            return self.lost_cause
        self.compute_ns += step_ns
        return None

    def count_run(self, clock: StepClock, at_ns: int) -> int:
        """It decoded in every step since ``mark``, up to the start or the end of the newest.

        Returns:
            Nanoseconds between those steps.
        """
        busy_ns = clock.busy_at(at_ns)
        self.compute_ns += max(0, busy_ns - self.busy_mark_ns)
        self.busy_mark_ns = busy_ns
        return self.count_gaps(clock)

    def count_again(self, compute_ns: int) -> None:
        """All that was computed since ``compute_ns`` was spent had been computed before."""
        self.add(self.lost_cause, self.compute_ns - compute_ns)
        self.compute_ns = compute_ns

    def lose(self, cause: StallCause, num_computed: int) -> None:
        """What is computed is lost; to compute it again is time spent on ``cause``."""
        self.lost_cause = cause
        self.num_lost_tokens = max(self.num_lost_tokens, num_computed)
