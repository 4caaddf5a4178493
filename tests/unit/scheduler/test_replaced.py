"""Two schedulers of one name at one executor, over real gRPC: the newer stays, the other ends."""

import asyncio
import functools

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.errors import AbortedError
from pageframe.core.trace import NullTraceSink
from pageframe.scheduler.client import GrpcExecutorStream
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.loop import SchedulerLoop
from pageframe.scheduler.options import SchedulerOptions
from unit.executor.executor_house import executor_house
from unit.scheduler.played_executor import PATIENCE_S


def make_loop(address, now_ns):
    clock = ManualClock(now_ns)
    return SchedulerLoop(
        functools.partial(GrpcExecutorStream.open, address, "model"),
        make_scheduler=lambda facts: Scheduler(
            facts,
            SchedulerOptions(token_budget=16, max_num_running=8),
            trace=NullTraceSink(),
            clock=clock,
        ),
        clock=clock,
    )


@pytest.mark.parametrize("newer_ns", [2_000_000, 500_000], ids=["later", "its clock is behind"])
def test_the_newer_of_two_schedulers_stays_and_the_other_ends(tmp_path, newer_ns):
    async def scenario():
        async with executor_house(tmp_path):
            address = f"unix:{tmp_path}/executor.sock"
            older, newer = make_loop(address, 1_000_000), make_loop(address, newer_ns)
            await older.start()
            await newer.start()
            with pytest.raises(AbortedError) as caught:
                await older.wait_ended()
            assert caught.value.reason == "SCHEDULER_REPLACED"
            assert (older.is_connected, newer.is_connected) == (False, True)
            await newer.stop()

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
