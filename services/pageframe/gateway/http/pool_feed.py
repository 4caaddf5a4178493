"""One look at the pool for all browsers of one caller: begins with the first, ends with the last.

    executor ──Snapshot, then Watch──▶ mirror ──at most 20 times a second──▶ frames ──▶ viewers

The executor is asked with the caller's own credentials: what the caller may not see never comes
here. A lost watch or a gap in it costs another snapshot, and no viewer has to do anything.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Final, Protocol

import structlog

from pageframe.core.clock import Clock
from pageframe.core.errors import PageframeError
from pageframe.core.replica import PoolAccount
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.gateway.http.pool_frames import PoolFrames
from pageframe.gateway.http.pool_mirror import MirrorLostError, PoolMirror
from pageframe.gateway.http.pool_stalls import StallSample
from pageframe.rpc.auth import Caller
from pageframe.wire.memory_facts import (
    BlockExplanation,
    MemorySnapshot,
    OperationBatch,
    StepFacts,
)

_log = structlog.get_logger(__name__)

FRAME_INTERVAL_S: Final = 0.05
"""More often nobody could read it; a thousand changes a second become frames of fifty."""

SNAPSHOT_INTERVAL_S: Final = 1.0
"""After a lost watch, the next one begins so much later."""

BOUNDS_INTERVAL_S: Final = 5.0
"""Bounds of tenants are in no operation: where blocks change, they are asked for so much later."""

# A snapshot takes a moment of the step thread; asking for bounds takes one part in so many of it.
_BOUNDS_PAUSE: Final = 20


class PoolClient(Protocol):
    """What is asked of KV memory; ``client.kv_memory_aio`` over the wire."""

    async def account(self) -> PoolAccount:
        """Blocks by state."""
        ...

    async def snapshot(self) -> MemorySnapshot:
        """The pool at one step boundary."""
        ...

    async def explain(self, block_id: int) -> BlockExplanation:
        """Who holds a block, why, and since when."""
        ...

    def watch(
        self, first_operation: int, *, pool_incarnation: int = 0
    ) -> AsyncGenerator[OperationBatch, None]:
        """Operations from a number on."""
        ...


class PoolFeed:
    """Follows one pool while somebody looks. For one event loop.

    Args:
        caller: Who looks.
        client: Asks the executor, with that caller's credentials.
        clock: Source of time.
        sample_stalls: Reads the gateway's totals.
        sleep: Waits so many seconds.

    Attributes:
        client: As given.
        num_viewers: Who looks now.
        num_snapshots: How often the executor was asked for everything.
    """

    def __init__(
        self,
        caller: Caller,
        client: PoolClient,
        clock: Clock,
        sample_stalls: Callable[[], StallSample],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.client = client
        self.num_viewers = 0
        self.num_snapshots = 0
        self._caller = caller
        self._clock = clock
        self._sample_stalls = sample_stalls
        self._sleep = sleep
        self._frames = PoolFrames(caller)
        self._num_resets = 0
        self._mirror: PoolMirror | None = None
        self._steps: list[StepFacts] = []
        self._has_news = asyncio.Event()
        self._has_changed = asyncio.Event()
        self._published = asyncio.Event()
        self._is_closed = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_resets(self) -> int:
        """How often a viewer was too slow to be told of changes alone."""
        return self._num_resets + self._frames.num_resets

    def close(self) -> None:
        """End all views."""
        self._is_closed = True
        self._wake()

    @contextlib.asynccontextmanager
    async def joined(self) -> AsyncIterator[None]:
        """Be one of the viewers while the block runs."""
        self.num_viewers += 1
        if not self._tasks:
            jobs = (self._follow, self._publish, self._learn_bounds, self._count_stalls)
            self._tasks = [asyncio.create_task(self._forever(job)) for job in jobs]
        try:
            yield
        finally:
            self.num_viewers -= 1
            if not self.num_viewers:
                await self._stop()

    async def views(self) -> AsyncGenerator[bytes, None]:
        """The pool as JSON: first everything, then what has changed since the last one was taken.

        Ends with ``close``.
        """
        seen = 0
        while not self._is_closed:
            if seen == self._frames.version:
                # Taken before anything is awaited: what is published after that sets it.
                await self._published.wait()
                continue
            frame = self._frames.since(seen)
            seen = self._frames.version
            yield frame

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        # The next viewer, who may come while these end, begins with how it is then.
        self._num_resets = self.num_resets
        self._frames, self._mirror = PoolFrames(self._caller), None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self) -> None:
        """Mirror the pool until that fails; called again then."""
        try:
            snapshot = await self._snapshot()
            mirror = PoolMirror(self._caller, snapshot)
            self._mirror = mirror
            self._frames.begin(mirror)
            self._wake()
            watch = self.client.watch(
                snapshot.operation + 1, pool_incarnation=snapshot.pool_incarnation
            )
            async with contextlib.aclosing(watch) as batches:
                async for batch in batches:
                    self._take(mirror, batch)
        except MirrorLostError as error:
            _log.info("pool_mirror_lost", message=str(error))
        except PageframeError as error:
            self._frames.lose(error.message)
            self._wake()
        await self._sleep(SNAPSHOT_INTERVAL_S)

    def _take(self, mirror: PoolMirror, batch: OperationBatch) -> None:
        self._steps += batch.steps
        mirror.take(batch, self._clock.now_ns())
        self._has_news.set()
        self._has_changed.set()

    async def _publish(self) -> None:
        """Make a version of what has come; not more often than a person can see."""
        await self._has_news.wait()
        self._has_news.clear()
        steps, self._steps = self._steps, []
        self._frames.publish(steps)
        self._wake()
        await self._sleep(FRAME_INTERVAL_S)

    async def _learn_bounds(self) -> None:
        """Ask for what operations do not tell, a while after something went on."""
        await self._has_changed.wait()
        await self._sleep(BOUNDS_INTERVAL_S)
        self._has_changed.clear()
        start_ns = self._clock.now_ns()
        try:
            snapshot = await self._snapshot()
        except PageframeError:
            # Whoever follows the pool hears of it, too.
            pass
        else:
            mirror = self._mirror
            if mirror is not None and mirror.snapshot.pool_incarnation == snapshot.pool_incarnation:
                mirror.learn(snapshot)
                self._has_news.set()
        took_s = (self._clock.now_ns() - start_ns) / NANOSECONDS_PER_SECOND
        await self._sleep(_BOUNDS_PAUSE * took_s)

    async def _count_stalls(self) -> None:
        self._frames.publish(samples=[self._sample_stalls()])
        self._wake()
        await self._sleep(1.0)

    async def _snapshot(self) -> MemorySnapshot:
        self.num_snapshots += 1
        return await self.client.snapshot()

    async def _forever(self, job: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await job()
            except Exception:
                # Our bug. The page has to go on, and its viewers must not wait for nothing.
                _log.exception("pool_feed_failed", job=job.__name__)
                await self._sleep(SNAPSHOT_INTERVAL_S)

    def _wake(self) -> None:
        published, self._published = self._published, asyncio.Event()
        published.set()
