"""What a scheduler counts of steps, and what it tells of its books."""

from pageframe.core.plan import Recovery
from pageframe.core.step import RefusedBecause, StepResult, StepTiming
from pageframe.scheduler.figures import SchedulerFigures
from pageframe.scheduler.metering import SchedulerMeter
from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import OTHER_NAMES

MS = 1_000_000


def values_of(meter, figures=None, *, is_connected=True):
    readings = meter.read(figures, is_connected=is_connected)
    return {(metric, *labels): value for metric, value, labels in readings}


def figures(**tenants):
    return SchedulerFigures(
        num_running=3,
        num_waiting=2,
        num_preempted=1,
        num_queued_requests=2,
        num_queued_tokens=90,
        num_steps_in_flight=1,
        tenants=tenants,
    )


def test_a_step_is_counted_by_its_parts():
    meter = SchedulerMeter()
    timing = StepTiming(
        start_ns=5, apply_ns=1 * MS, execute_ns=6 * MS, sample_ns=1 * MS, copy_ns=2 * MS,
        num_blocks_moved=4,
    )  # fmt: skip
    result = StepResult(
        step=1,
        sampled_ids=[1, 1, 2],
        preempted_ids=[7, 8],
        preempted_num_blocks=[3, 2],
        preempted_recoveries=[Recovery.SWAP, Recovery.RECOMPUTE],
        refused_ids=[9],
        refused_because=[RefusedBecause.QUOTA],
        timing=timing,
    )
    meter.take(result)
    meter.take(StepResult(step=0, released=[4]))
    values = values_of(meter)
    assert sum(values[metrics.STEP_SECONDS,].counts) == 1
    assert values[metrics.STEP_SECONDS,].total == 0.008
    assert values[metrics.STEP_PART_SECONDS, "execute"] == 0.006
    assert values[metrics.STEP_PART_SECONDS, "copy"] == 0.002
    assert values[metrics.SAMPLED_TOKENS,] == 3
    assert values[metrics.MOVED_BLOCKS,] == 4
    assert values[metrics.PREEMPTIONS, "swap"] == values[metrics.PREEMPTIONS, "recompute"] == 1
    assert values[metrics.PREEMPTIONS, "tail"] == 0
    assert values[metrics.PREEMPTED_BLOCKS,] == 5
    assert values[metrics.REFUSED_ENTRIES, "quota"] == 1


def test_the_books_are_told_by_state_and_tenant():
    values = values_of(SchedulerMeter(), figures(alice=(2, 1), bob=(1, 2)))
    assert values[metrics.SEQUENCES, "running"] == 3
    assert values[metrics.SEQUENCES, "preempted"] == 1
    assert values[metrics.QUEUED_TOKENS,] == 90
    assert values[metrics.TENANT_SEQUENCES, "alice", "running"] == 2
    assert values[metrics.TENANT_SEQUENCES, "bob", "waiting"] == 2
    assert values[metrics.EXECUTOR_CONNECTED,] == 1


def test_tenants_past_the_bound_add_up():
    tenants = {f"t{number}": (1, 0) for number in range(103)}
    values = values_of(SchedulerMeter(), figures(**tenants))
    assert values[metrics.TENANT_SEQUENCES, OTHER_NAMES, "running"] == 3


def test_before_the_first_executor_nothing_is_told_of_books():
    values = values_of(SchedulerMeter(), None, is_connected=False)
    assert values[metrics.EXECUTOR_CONNECTED,] == 0
    assert (metrics.SEQUENCES, "running") not in values
