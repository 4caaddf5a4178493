"""What an executor tells of its pool."""

from pageframe.executor.metering import ExecutorMeter
from pageframe.telemetry import metrics
from unit.executor.small_engine import SmallEngine, request


def values_of(memory):
    meter = ExecutorMeter(lambda: 11, lambda: 2)
    return {(metric, *labels): value for metric, value, labels in meter.read(memory)}


def test_blocks_are_told_by_state_and_by_tenant():
    house = SmallEngine(num_blocks=8, block_size=4)
    house.start(request(1, range(2, 8), tenant="alice"))
    values = values_of(house.engine.memory)
    states = {key[1]: value for key, value in values.items() if key[0] is metrics.BLOCKS}
    assert states == {"free": 6, "held": 2, "cached": 0, "fenced": 0, "quarantined": 0}
    assert values[metrics.TENANT_BLOCKS, "alice"] == 2
    assert values[metrics.KV_OPERATIONS,] == 11
    assert values[metrics.DROPPED_RECORDS,] == 2
    assert values[metrics.HOST_BLOCKS_MAX,] == 0


def test_while_the_model_loads_there_is_no_pool():
    values = values_of(None)
    assert set(values) == {(metrics.KV_OPERATIONS,), (metrics.DROPPED_RECORDS,)}
