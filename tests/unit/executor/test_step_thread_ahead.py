"""The step thread over a device that computes beside it: what follows a step, and what waits."""

import asyncio
import os

import pytest

from pageframe.core.plan import StepPlan
from pageframe.core.replica import TenantQuota
from pageframe.executor.step_thread import Session
from unit.executor.played_engine import PATIENCE_S
from unit.executor.test_step_thread import House


class AheadHouse(House):
    """Steps of its engine are computed by a device, and end when they are let."""

    def __init__(self):
        super().__init__()
        self.engine.is_ahead = True


def run_ahead(scenario):
    async def main():
        opened = AheadHouse()
        await opened.steps.start(lambda: opened.engine)
        try:
            return await asyncio.wait_for(scenario(opened), PATIENCE_S)
        finally:
            opened.engine.release()
            await opened.steps.stop()

    return asyncio.run(main())


def test_a_plan_that_may_follow_is_launched_before_the_step_ahead_of_it_ends():
    async def scenario(house):
        await house.run_held_step()
        house.engine._entered.clear()
        house.post_plans(2)
        await house.engine.wait_held()
        assert house.engine.calls == [("step", 1), ("step", 2)]
        await house.settle()
        assert house.engine.calls[2:] == [("collected", 1), ("collected", 2)]
        assert [step for step, _ in house.delivered] == [1, 2]

    run_ahead(scenario)


def test_a_step_that_nothing_follows_is_collected_when_it_ends():
    async def scenario(house):
        delivered = asyncio.Event()
        loop = asyncio.get_running_loop()
        house.session = Session(lambda *_: loop.call_soon_threadsafe(delivered.set))
        await house.run_held_step()
        house.engine.release()
        await delivered.wait()
        assert house.engine.calls == [("step", 1), ("collected", 1)]

    run_ahead(scenario)


def test_what_cannot_follow_a_step_in_flight_waits_for_its_end():
    async def scenario(house):
        await house.run_held_step()
        plan = StepPlan(step=2, builds_on=1, finish=[7])
        house.steps.post_plan(house.session, plan)
        await house.settle()
        steps = [("step", 1), ("collected", 1), ("step", 2), ("collected", 2)]
        assert house.engine.calls == steps

    run_ahead(scenario)


def test_cancels_quotas_and_calls_find_no_step_in_flight():
    async def scenario(house):
        await house.run_held_step()
        house.steps.post_cancel(house.session, [7])
        house.steps.post_quotas(house.session, [TenantQuota(tenant="a", floor_blocks=1)])
        call = asyncio.create_task(
            house.steps.call(lambda: house.engine.calls.append(house.engine.num_in_flight))
        )
        await asyncio.sleep(0)  # The call is posted.
        await house.settle()
        await call
        assert house.engine.calls == [("step", 1), ("collected", 1), ("cancel", [7]), 0]

    run_ahead(scenario)


def test_a_step_in_flight_when_the_thread_is_to_end_is_collected():
    async def scenario(house):
        await house.run_held_step()
        stopping = asyncio.create_task(house.steps.stop())
        await asyncio.sleep(0)  # The end is posted.
        house.engine.release()
        await stopping
        assert house.engine.calls == [("step", 1), ("collected", 1)]
        assert [step for step, _ in house.delivered] == [1]

    run_ahead(scenario)


def test_what_a_step_in_flight_fails_with_ends_the_thread():
    async def scenario(house):
        await house.run_held_step()
        house.engine.failure = RuntimeError("the engine is on fire")
        house.engine.release()
        with pytest.raises(RuntimeError, match="on fire"):
            await house.steps.wait_ended()

    run_ahead(scenario)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="there is no such policy here")
@pytest.mark.parametrize("takes_cores", [True, False])
def test_it_gives_way_to_those_who_compute_what_it_has_launched(takes_cores):
    async def scenario(house):
        house.engine.takes_cores = takes_cores
        await house.run_held_step()
        await house.settle()
        return await house.steps.call(lambda: os.sched_getscheduler(0))

    policy = run_ahead(scenario)
    assert policy == (os.SCHED_BATCH if takes_cores else os.SCHED_OTHER)
