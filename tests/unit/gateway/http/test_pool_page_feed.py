"""The feed: one watch for all viewers of a caller, from the first to the last of them."""

import asyncio
import contextlib

import pytest
import structlog

from pageframe.core.clock import ManualClock
from pageframe.core.trace import KvOperation
from pageframe.gateway.http.pool_feed import (
    BOUNDS_INTERVAL_S,
    FRAME_INTERVAL_S,
    SNAPSHOT_INTERVAL_S,
    PoolFeed,
)
from pageframe.gateway.http.pool_stalls import StallSample
from pageframe.rpc.auth import Caller
from pageframe.wire.memory_facts import StepFacts
from unit.gateway.http.played_memory import PlayedMemory, Screen, Sleeper

PATIENCE_S = 20


class House:
    def __init__(self):
        self.memory = PlayedMemory()
        self.sleeper = Sleeper()
        self.feed = PoolFeed(
            Caller("ops", is_operator=True),
            self.memory,
            ManualClock(1_000_000_000),
            lambda: StallSample(1_000_000_000, 2.0, {"queue": 1.0}),
            self.sleeper,
        )

    @contextlib.asynccontextmanager
    async def viewer(self):
        """A screen that takes each frame as it comes."""
        screen = Screen()

        async def look():
            async with self.feed.joined():
                async for frame in self.feed.views():
                    screen.take(frame)

        task = asyncio.create_task(look())
        try:
            yield screen
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def until(self, condition, pass_s=0.0):
        """Let the loop go round, and so much time pass each time, until a condition holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.sleeper.pass_time(pass_s)
                await asyncio.sleep(0)

    async def rest(self, pass_s=FRAME_INTERVAL_S):
        """Let all that is due be done, and so much time pass each time the loop goes round."""
        for _ in range(20):
            self.sleeper.pass_time(pass_s)
            await asyncio.sleep(0)


def run(scenario):
    async def main():
        async with asyncio.timeout(60):
            await scenario(House())

    asyncio.run(main())


def test_one_watch_serves_all_viewers_and_ends_with_the_last():
    async def scenario(house):
        memory = house.memory
        async with house.viewer() as one:
            await house.until(lambda: one.columns)
            async with house.viewer() as other:
                await house.until(lambda: other.columns)
                memory.do(KvOperation.ALLOCATE, 3, 4, 5)
                changed = ["free"] * 4 + ["held"] * 2 + ["free"] * 2
                for screen in (one, other):
                    await house.until(
                        lambda screen=screen: screen.kinds() == changed, FRAME_INTERVAL_S
                    )
            assert (memory.num_watching, house.feed.num_viewers) == (1, 1)
        assert (memory.num_watches, memory.num_watching, house.feed.num_viewers) == (1, 0, 0)
        async with house.viewer() as again:
            await house.until(lambda: again.columns)
            assert again.kinds() == changed, "it begins with how it is now"
        assert (memory.num_watches, memory.num_watching) == (2, 0)

    run(scenario)


def test_changes_between_two_pictures_come_together():
    async def scenario(house):
        async with house.viewer() as screen:
            await house.until(lambda: screen.columns)
            house.memory.do(KvOperation.ALLOCATE, 3, 6)
            await house.until(lambda: 3 in screen.names, FRAME_INTERVAL_S)
            await house.rest()
            # The first change after a rest is shown at once, and begins an interval.
            house.memory.do(KvOperation.ALLOCATE, 3, 0)
            await house.until(lambda: screen.kinds()[0] == "held")
            version = screen.version
            for block_id in range(1, 6):
                house.memory.do(KvOperation.ALLOCATE, 3, block_id)
                await house.rest(0.0)
            # All operations are in; no time has passed, so nothing is shown yet.
            assert house.feed._mirror.operation == house.memory.number
            assert screen.version == version
            await house.until(lambda: screen.version > version, FRAME_INTERVAL_S)
            assert screen.kinds() == ["held"] * 7 + ["free"]
            assert screen.version == version + 1

    run(scenario)


def test_steps_come_with_the_operations():
    async def scenario(house):
        async with house.viewer() as screen:
            await house.until(lambda: screen.columns)
            facts = StepFacts(8, 4_000_000, 2_000_000, 3, 9, 1)
            house.memory.do(KvOperation.ALLOCATE, 3, 0, steps=(facts,))
            await house.until(lambda: screen.steps, FRAME_INTERVAL_S)
            assert screen.steps == [[8, 4.0, 2.0, 3, 9, 1]]

    run(scenario)


def test_whose_a_new_sequence_is_comes_with_its_blocks_and_costs_no_snapshot():
    async def scenario(house):
        async with house.viewer() as screen:
            await house.until(lambda: screen.columns)
            num_before = house.memory.num_snapshots
            for sequence_id in (3, 4, 5):
                house.memory.do(KvOperation.ALLOCATE, sequence_id, sequence_id)
            await house.until(lambda: screen.kinds()[5] == "held", FRAME_INTERVAL_S)
            assert screen.names == {it: ("red", f"r{it}", it) for it in (3, 4, 5)}
            assert (house.memory.num_snapshots, screen.num_whole) == (num_before, 1)

    run(scenario)


def test_what_operations_do_not_tell_is_asked_a_while_after_something_went_on():
    async def scenario(house):
        async with house.viewer() as screen:
            await house.until(lambda: screen.columns)
            house.memory.tells_names = False
            num_before = house.memory.num_snapshots
            await house.rest(BOUNDS_INTERVAL_S)
            assert house.memory.num_snapshots == num_before, "nothing went on"
            for sequence_id in (3, 4):
                house.memory.do(KvOperation.ALLOCATE, sequence_id, sequence_id)
            await house.until(lambda: screen.kinds()[4] == "held", FRAME_INTERVAL_S)
            await house.rest()
            assert (house.memory.num_snapshots, screen.names) == (num_before, {})
            await house.until(lambda: set(screen.names) == {3, 4}, BOUNDS_INTERVAL_S)
            assert house.memory.num_snapshots == num_before + 1

    run(scenario)


def test_a_gap_costs_a_snapshot_and_no_viewer_does_anything():
    async def scenario(house):
        async with house.viewer() as screen:
            await house.until(lambda: screen.columns)
            num_whole = screen.num_whole
            house.memory.do(KvOperation.ALLOCATE, 3, 0, num_lost=5)
            await house.until(lambda: screen.num_whole > num_whole, SNAPSHOT_INTERVAL_S)
            assert screen.kinds()[0] == "held"
            house.memory.do(KvOperation.ALLOCATE, 3, 1)
            await house.until(lambda: screen.kinds()[1] == "held", FRAME_INTERVAL_S)
            assert screen.num_whole == num_whole + 1
            assert house.feed.num_resets == 0

    run(scenario)


def test_an_executor_that_goes_away_is_waited_for():
    async def scenario(house):
        memory = house.memory
        async with house.viewer() as screen:
            await house.until(lambda: screen.columns)
            memory.is_away = True
            memory.end_watches()
            await house.until(lambda: screen.away == "the executor is stopping")
            await house.until(
                lambda: screen.away == "nobody answers at the executor", SNAPSHOT_INTERVAL_S
            )
            assert screen.kinds() == ["free"] * 8, "what it was like stays"
            memory.is_away, memory.incarnation, memory.number = False, 8, 0
            memory.states[2] = 1
            await house.until(lambda: screen.away == "", SNAPSHOT_INTERVAL_S)
            assert screen.kinds()[2] == "held"

    run(scenario)


def test_a_viewer_that_does_not_read_costs_nothing_and_catches_up():
    async def scenario(house):
        async with house.viewer() as quick, house.feed.joined():
            slow, views = Screen(), house.feed.views()
            slow.take(await anext(views))
            await house.until(lambda: quick.columns)
            for number in range(200):
                operation = KvOperation.FREE if number % 2 else KvOperation.ALLOCATE
                if operation is KvOperation.FREE:
                    house.memory.do(KvOperation.RELEASE, 3, 0)
                house.memory.do(operation, 3, 0)
                version = quick.version
                await house.until(lambda v=version: quick.version > v, FRAME_INTERVAL_S)
            house.memory.do(KvOperation.ALLOCATE, 4, 7)
            await house.until(lambda: quick.kinds()[7] == "held", FRAME_INTERVAL_S)
            slow.take(await anext(views))
            assert slow.kinds() == quick.kinds()
            assert (slow.version, house.feed.num_resets) == (quick.version, 1)
            await views.aclose()

    run(scenario)


def test_views_end_when_the_gateway_does():
    async def scenario(house):
        async with house.feed.joined():
            views = house.feed.views()
            await anext(views)
            house.feed.close()
            async for _ in views:
                pytest.fail("closed is closed")

    run(scenario)


def test_a_fault_of_ours_is_told_in_the_log_and_the_page_goes_on():
    async def scenario(house):
        async with house.viewer() as screen:
            with structlog.testing.capture_logs() as logs:
                await house.until(lambda: screen.columns)
                take, house.feed._take = house.feed._take, lambda *_: 1 / 0
                house.memory.do(KvOperation.ALLOCATE, 3, 0)
                await house.until(lambda: logs)
                house.feed._take = take
                await house.until(lambda: screen.kinds()[0] == "held", SNAPSHOT_INTERVAL_S)
            assert [it["event"] for it in logs] == ["pool_feed_failed"]

    run(scenario)
