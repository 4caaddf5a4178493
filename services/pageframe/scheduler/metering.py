"""What a scheduler counts of steps, and what it tells when somebody asks for metrics."""

from collections import Counter
from collections.abc import Iterator

from pageframe.core.plan import Recovery
from pageframe.core.step import RefusedBecause, StepResult
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.scheduler.figures import SchedulerFigures
from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import BoundedNames, Histogram, Reading


class SchedulerMeter:
    """The counts of one scheduler process. A step costs the same whatever runs in it."""

    def __init__(self) -> None:
        self._tenants = BoundedNames()
        self._step = Histogram(metrics.STEP_BOUNDS)
        self._part_ns = dict.fromkeys(("apply", "execute", "sample", "copy"), 0)
        self._preemptions: Counter[Recovery] = Counter()
        self._refused: Counter[int] = Counter()
        self._num_preempted_blocks = 0
        self._num_sampled_tokens = 0
        self._num_moved_blocks = 0

    def take(self, result: StepResult) -> None:
        """A step's result has come; reports outside any step say nothing of this."""
        timing = result.timing
        if not result.step or not timing.start_ns:
            return
        self._step.observe((timing.end_ns - timing.start_ns) / NANOSECONDS_PER_SECOND)
        part_ns = self._part_ns
        part_ns["apply"] += timing.apply_ns
        part_ns["execute"] += timing.execute_ns
        part_ns["sample"] += timing.sample_ns
        part_ns["copy"] += timing.copy_ns
        self._num_moved_blocks += timing.num_blocks_moved
        self._num_sampled_tokens += len(result.sampled_ids)
        if result.preempted_ids:
            self._preemptions.update(result.preempted_recoveries)
            self._num_preempted_blocks += sum(result.preempted_num_blocks)
        if result.refused_because:
            self._refused.update(result.refused_because)

    def read(self, figures: SchedulerFigures | None, *, is_connected: bool) -> Iterator[Reading]:
        """All values now; ``figures`` are None while no executor has ever been there."""
        yield Reading(metrics.EXECUTOR_CONNECTED, int(is_connected))
        if figures is not None:
            yield from self._read_figures(figures)
        yield Reading(metrics.STEP_SECONDS, self._step)
        for part, part_ns in self._part_ns.items():
            yield Reading(metrics.STEP_PART_SECONDS, part_ns / NANOSECONDS_PER_SECOND, (part,))
        yield Reading(metrics.SAMPLED_TOKENS, self._num_sampled_tokens)
        for recovery in Recovery:
            labels = (recovery.name.lower(),)
            yield Reading(metrics.PREEMPTIONS, self._preemptions[recovery], labels)
        yield Reading(metrics.PREEMPTED_BLOCKS, self._num_preempted_blocks)
        for because in RefusedBecause:
            labels = (because.name.lower(),)
            yield Reading(metrics.REFUSED_ENTRIES, self._refused[because], labels)
        yield Reading(metrics.MOVED_BLOCKS, self._num_moved_blocks)

    def _read_figures(self, figures: SchedulerFigures) -> Iterator[Reading]:
        yield Reading(metrics.SEQUENCES, figures.num_running, ("running",))
        yield Reading(metrics.SEQUENCES, figures.num_waiting, ("waiting",))
        yield Reading(metrics.SEQUENCES, figures.num_preempted, ("preempted",))
        yield Reading(metrics.QUEUED_REQUESTS, figures.num_queued_requests)
        yield Reading(metrics.QUEUED_TOKENS, figures.num_queued_tokens)
        yield Reading(metrics.STEPS_IN_FLIGHT, figures.num_steps_in_flight)
        # Tenants past the bound add up.
        counts: Counter[tuple[str, str]] = Counter()
        for tenant, (num_running, num_waiting) in figures.tenants.items():
            label = self._tenants.of(tenant)
            counts[label, "running"] += num_running
            counts[label, "waiting"] += num_waiting
        for labels, count in counts.items():
            yield Reading(metrics.TENANT_SEQUENCES, count, labels)
