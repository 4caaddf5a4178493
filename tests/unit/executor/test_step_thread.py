"""The step thread: commands in order, cancels ahead of plans, nothing for who is gone."""

import asyncio
import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import structlog

from pageframe.config.cores import give_way
from pageframe.core.errors import ResourceExhaustedError
from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.executor.step_thread import Session, StepThread
from unit.executor.played_engine import PATIENCE_S, PlayedEngine


class House:
    """A step thread over a played engine, and a session that keeps what it is told."""

    def __init__(self, **options):
        self.engine = PlayedEngine()
        self.steps = StepThread(asyncio.get_running_loop(), **options)
        self.delivered = []
        self.session = self.open_session()

    def open_session(self):
        return Session(lambda result, last: self.delivered.append((result.step, last)))

    def post_plans(self, *numbers):
        for number in numbers:
            self.steps.post_plan(self.session, StepPlan(step=number, builds_on=number - 1))

    async def run_held_step(self):
        """Step 1 has begun, and ends when the engine is released."""
        self.engine.hold()
        self.post_plans(1)
        await self.engine.wait_held()

    async def settle(self):
        """Everything posted so far is done."""
        self.engine.release()
        await asyncio.wait_for(self.steps.call(lambda: None), PATIENCE_S)


@contextlib.asynccontextmanager
async def house(**options):
    house = House(**options)
    await house.steps.start(lambda: house.engine)
    try:
        yield house
    finally:
        house.engine.release()
        await house.steps.stop()


def run(scenario, **options):
    """Run a scenario, a coroutine function that takes a house, to its end."""

    async def main():
        async with house(**options) as opened:
            return await asyncio.wait_for(scenario(opened), PATIENCE_S)

    return asyncio.run(main())


def test_commands_are_done_in_the_order_of_their_posting():
    async def scenario(house):
        await house.run_held_step()
        house.post_plans(2)
        call = asyncio.create_task(house.steps.call(lambda: house.engine.calls.append("call")))
        await asyncio.sleep(0)  # The call is posted.
        house.post_plans(3)
        await house.settle()
        await call
        assert house.engine.calls == [("step", 1), ("step", 2), "call", ("step", 3)]
        assert house.delivered == [(1, 1), (2, 2), (3, 3)]

    run(scenario)


def test_cancels_overtake_waiting_plans_and_go_together():
    async def scenario(house):
        await house.run_held_step()
        house.post_plans(2, 3)
        house.steps.post_cancel(house.session, [7, 8])
        house.steps.post_cancel(house.session, [9])
        await house.settle()
        assert house.engine.calls == [("step", 1), ("cancel", [7, 8, 9]), ("step", 2), ("step", 3)]
        assert house.delivered == [(1, 1), (0, 1), (2, 2), (3, 3)]

    run(scenario)


def test_a_cancel_at_rest_is_done_at_once():
    async def scenario(house):
        house.steps.post_cancel(house.session, [7])
        await house.settle()
        assert house.engine.calls == [("cancel", [7])]
        assert house.delivered == [(0, 0)]

    run(scenario)


def test_a_closed_session_gets_nothing_and_its_plans_are_dropped():
    async def scenario(house):
        await house.run_held_step()
        house.post_plans(2)
        house.steps.post_cancel(house.session, [7])
        house.session.close()
        house.session = house.open_session()
        house.post_plans(3)
        await house.settle()
        assert house.engine.calls == [("step", 1), ("step", 3)]
        assert house.delivered == [(3, 3)]

    run(scenario)


def test_other_quotas_hold_before_the_plans_behind_them_and_from_the_session_that_holds():
    async def scenario(house):
        quotas = [TenantQuota(tenant="a", floor_blocks=1)]
        await house.steps.take_over(house.session, [])
        await house.run_held_step()
        house.steps.post_quotas(house.session, quotas)
        assert house.engine.desk.quotas == [], "the running step is not disturbed"
        await house.settle()
        assert house.engine.desk.quotas == quotas
        house.steps.post_quotas(house.open_session(), [])
        await house.settle()
        assert house.engine.desk.quotas == quotas, "somebody else is not asked"
        house.session.close()
        house.steps.post_quotas(house.session, [])
        await house.settle()
        assert house.engine.desk.quotas == quotas, "nor who is gone"

    run(scenario)


def test_a_take_over_waits_for_the_running_step():
    async def scenario(house):
        await house.run_held_step()
        house.post_plans(2)
        house.session.close()
        account = asyncio.create_task(house.steps.take_over(house.session, []))
        await house.settle()
        assert await account == PoolAccount(total=4, free=4)
        assert house.engine.calls == [("step", 1), "reset"]

    run(scenario)


def test_everything_runs_on_one_thread_of_its_own_from_the_building_on():
    async def main():
        house = House()

        def build():
            house.engine.threads.add(threading.current_thread().name)
            return house.engine

        await house.steps.start(build)
        assert house.engine.threads == {"step"}
        house.post_plans(1)
        house.steps.post_cancel(house.session, [7])
        await house.steps.take_over(house.session, [])
        await house.steps.account()
        await house.engine.wait_checked()
        await house.steps.stop()
        assert house.engine.threads == {"step"}

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_an_error_of_building_comes_out_of_start_and_the_thread_can_be_stopped():
    def build():
        raise ResourceExhaustedError("KV_ARENA_TOO_LARGE", "too large")

    async def main():
        steps = StepThread(asyncio.get_running_loop())
        with pytest.raises(ResourceExhaustedError, match="too large"):
            await steps.start(build)
        await steps.stop()
        await steps.wait_ended()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_an_error_of_a_call_is_its_callers_alone():
    def fail():
        raise ValueError("no such block")

    async def scenario(house):
        with pytest.raises(ValueError, match="no such block"):
            await house.steps.call(fail)
        house.post_plans(1)
        await house.settle()
        assert house.delivered == [(1, 1)]

    run(scenario)


def test_integrity_is_checked_once_for_each_rest():
    async def scenario(house):
        for number in (1, 2):
            house.post_plans(number)
            await house.engine.wait_checked()
            for _ in range(20):
                await house.settle()
            assert house.engine.num_checks == number

    run(scenario)


def test_nobody_who_has_a_result_and_asks_for_more_waits_for_the_check():
    async def scenario(house):
        for number in (1, 2):
            house.post_plans(number)
            await house.settle()
            await house.settle()
            assert house.delivered[-1] == (number, number)
        assert house.engine.num_checks == 0

    run(scenario, rest_seconds=3600)


def test_integrity_is_left_alone_while_a_sequence_lives():
    async def scenario(house):
        house.engine.is_idle = False
        for number in range(1, 20):
            house.post_plans(number)
            await house.settle()
        assert house.engine.num_checks == 0
        house.engine.is_idle = True
        house.steps.post_cancel(house.session, [7])
        await house.engine.wait_checked()

    run(scenario)


def test_violations_are_logged():
    async def scenario(house):
        house.engine.violations = ["block 3 is lost"]
        house.post_plans(1)
        await house.engine.wait_checked()
        await house.settle()

    with structlog.testing.capture_logs() as lines:
        run(scenario)
    found = [line for line in lines if line["event"] == "integrity_violation"]
    assert [(line["log_level"], line["violation"]) for line in found] == [
        ("error", "block 3 is lost")
    ]


def test_a_step_that_raises_ends_the_thread_and_is_raised_to_who_waits():
    async def scenario(house):
        ended = asyncio.create_task(house.steps.wait_ended())
        house.engine.failure = AssertionError("block 3 has -1 references")
        house.post_plans(1, 2)
        with pytest.raises(AssertionError, match="-1 references"):
            await ended
        assert house.engine.calls == [("step", 1)]
        assert house.delivered == []

    with structlog.testing.capture_logs() as lines:
        run(scenario)
    assert [line["event"] for line in lines] == ["step_thread_failed"]


def test_stop_ends_the_thread_after_what_was_posted():
    async def scenario(house):
        await house.run_held_step()
        house.post_plans(2)
        stop = asyncio.create_task(house.steps.stop())
        await asyncio.sleep(0)  # The end is posted.
        house.post_plans(3)
        house.engine.release()
        await stop
        await house.steps.wait_ended()
        assert house.engine.calls == [("step", 1), ("step", 2)]
        await house.steps.stop()

    run(scenario)


def test_who_gives_up_waiting_for_the_end_does_not_spoil_it_for_others():
    async def scenario(house):
        waiter = asyncio.create_task(house.steps.wait_ended())
        await asyncio.sleep(0)  # The waiter waits.
        waiter.cancel()
        await asyncio.wait((waiter,))
        assert waiter.cancelled()
        await house.steps.stop()
        await house.steps.wait_ended()

    run(scenario)


def test_a_thread_that_never_started_can_be_stopped():
    async def main():
        await StepThread(asyncio.get_running_loop()).stop()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_change_between_steps_is_reported_once():
    async def scenario(house):
        await house.steps.take_over(house.session, [])
        await house.steps.call(lambda: setattr(house.engine, "num_free", 1))
        await house.settle()
        assert house.delivered == [(0, 0)]

    run(scenario)


def test_what_is_due_is_done_at_rest_without_a_command():
    async def scenario(house):
        await house.steps.take_over(house.session, [])

        def begin() -> None:
            house.engine.desk.next_due_ns = 1
            house.engine.num_free = 2

        passed, loop = asyncio.Event(), asyncio.get_running_loop()

        def look() -> None:
            if house.engine.desk.num_passes:
                loop.call_soon_threadsafe(passed.set)

        house.steps.watch(look)
        await house.steps.call(begin)
        # A command that came at once would run ahead of what is due.
        await asyncio.wait_for(passed.wait(), PATIENCE_S)
        assert house.engine.desk.num_passes == 1

    run(scenario)


def test_a_hello_brings_quotas():
    async def scenario(house):
        quota = TenantQuota(tenant="alice", floor_blocks=2)
        await house.steps.take_over(house.session, [quota])
        assert house.engine.desk.quotas == [quota]

    run(scenario)


def test_a_quota_that_is_set_is_reported_though_no_block_has_moved():
    """A tenant that rests at its ceiling has to hear of a higher one."""

    async def scenario(house):
        await house.steps.take_over(house.session, [])
        await house.steps.call(lambda: setattr(house.engine.desk, "num_quota_changes", 1))
        await house.settle()
        assert house.delivered == [(0, 0)]

    run(scenario)


def test_a_rest_is_used_until_there_is_no_more_to_do():
    async def scenario(house):
        desk = house.engine.desk
        await desk.wait_rested()
        await house.run_held_step()
        desk.num_rests = 3
        house.engine.release()
        await desk.wait_rested()
        assert desk.num_rests == 0

    run(scenario)


def test_a_command_does_not_wait_for_the_use_of_a_rest():
    async def scenario(house):
        desk = house.engine.desk

        def post_once():
            house.engine.calls.append("rest")
            if desk.num_rests == 4:
                house.post_plans(1)

        await desk.wait_rested()
        desk.on_rest = post_once
        desk.num_rests = 5
        house.steps.post_cancel(house.session, [])
        await desk.wait_rested()
        assert house.engine.calls == ["rest", ("step", 1), "rest", "rest", "rest", "rest"]

    run(scenario)


def test_a_pause_while_a_sequence_lives_is_no_rest():
    async def scenario(house):
        desk = house.engine.desk
        await desk.wait_rested()
        house.engine.is_idle = False
        desk.num_rests = 3
        house.post_plans(1)
        for _ in range(20):
            await house.settle()
        assert desk.num_rests == 3

    run(scenario)


def test_the_step_thread_goes_first_where_the_one_that_starts_it_gives_way():
    async def scenario(house):
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
        assert await house.steps.call(lambda: os.sched_getscheduler(0)) == os.SCHED_OTHER

    def serve():
        give_way()
        run(scenario)

    with ThreadPoolExecutor(1) as threads:
        threads.submit(serve).result(PATIENCE_S)
