"""The whole system in one process: the same cores and loops, without the wire between them.

    GenerationService ──submit──▶ SchedulerLoop ──plan──▶ StepThread
          mailbox ◀──── events ────────┘ ◀──── result ───────┘

What three processes cost beside this is what the split costs.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from pageframe.config.imports import collecting_no_garbage
from pageframe.config.launch import Launch
from pageframe.core.clock import SystemClock
from pageframe.core.errors import PageframeError
from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount, ReplicaFacts, TenantQuota
from pageframe.core.request import Submission, TokenEvents
from pageframe.core.step import StepResult
from pageframe.core.trace import TraceSink
from pageframe.executor.engine import StepEngine
from pageframe.executor.server import build_engine
from pageframe.executor.step_thread import Session, StepThread
from pageframe.gateway.codec_store import CodecStore
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.living import LivingRequests
from pageframe.gateway.mailbox import Mailbox
from pageframe.rpc.auth import Authenticator
from pageframe.rpc.lifecycle import use_short_switch_interval
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.loop import SchedulerLoop
from pageframe.scheduler.server import make_scheduler

_GATEWAY = 1


class LocalStream:
    """A scheduler's connection to a step thread of the same process."""

    def __init__(self, steps: StepThread, facts: ReplicaFacts) -> None:
        self.facts = facts
        self.pool = PoolAccount()
        self._steps = steps
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[StepResult] = asyncio.Queue()
        self._session = Session(self._deliver)

    async def connect(self, quotas: Sequence[TenantQuota]) -> None:
        """Take the step thread over, as a hello does."""
        self.pool = await self._steps.take_over(self._session, quotas)

    async def send_plan(self, plan: StepPlan) -> None:
        """Post one plan."""
        self._steps.post_plan(self._session, plan)

    async def send_cancel(self, sequence_ids: list[int]) -> None:
        """Have sequences ended at once."""
        self._steps.post_cancel(self._session, sequence_ids)

    async def send_quotas(self, quotas: Sequence[TenantQuota]) -> None:
        """Bound tenants otherwise."""
        self._steps.post_quotas(self._session, quotas)

    async def results(self) -> AsyncIterator[StepResult]:
        """Results in the order of their plans; never ends."""
        while True:
            yield await self._results.get()

    async def close(self) -> None:
        """Stop delivering."""
        self._session.close()

    def _deliver(self, result: StepResult, _last_applied_step: int) -> None:
        self._loop.call_soon_threadsafe(self._results.put_nowait, result)


class LocalLink:
    """A gateway's connection to a scheduler loop of the same process."""

    def __init__(self, loop: SchedulerLoop) -> None:
        self._loop = loop
        self._living = LivingRequests()
        loop.attach(_GATEWAY, self._on_events)

    @property
    def facts(self) -> ReplicaFacts:
        """What the replica serves."""
        return self._loop.facts

    @property
    def served(self) -> tuple[ReplicaFacts, ...]:
        """The same: there is one."""
        return (self.facts,)

    def submit(self, submission: Submission, mailbox: Mailbox) -> int:
        """Hand in a request; returns its handle.

        Raises:
            PageframeError: refused, with the numbers.
        """
        handle = self._living.add(submission, mailbox)
        try:
            self._loop.submit(_GATEWAY, submission)
        except PageframeError:
            self._living.take_back(handle, None)
            raise
        return handle

    def cancel(self, handle: int, sample_index: int | None = None) -> None:
        """Take back a request or one of its samples; nothing happens if it has ended."""
        if self._living.take_back(handle, sample_index):
            self._loop.cancel(_GATEWAY, handle, sample_index)

    def _on_events(self, events: TokenEvents) -> None:
        for handle in self._living.take_events(events):
            self.cancel(handle)


@contextlib.asynccontextmanager
async def in_process_system(launch: Launch, trace: TraceSink) -> AsyncIterator[GenerationService]:
    """Serve in this process while the block runs."""
    use_short_switch_interval()
    clock = SystemClock()
    steps = StepThread(asyncio.get_running_loop())
    engines: list[StepEngine] = []

    def build() -> StepEngine:
        engines.append(build_engine(launch, trace))
        return engines[0]

    async def open_stream(_epoch: int) -> LocalStream:
        stream = LocalStream(steps, engines[0].describe(launch.settings.model))
        await stream.connect(launch.settings.tenant_quotas)
        return stream

    def build_scheduler(facts: ReplicaFacts) -> Scheduler:
        return make_scheduler(facts, launch.settings, trace, clock)

    # As each service does: a model's modules are looked through by no collection of garbage.
    with collecting_no_garbage():
        await steps.start(build)
        loop = SchedulerLoop(open_stream, make_scheduler=build_scheduler, clock=clock)
        await loop.start()
        service = GenerationService(LocalLink(loop), CodecStore(), Authenticator({}), clock, trace)
        await service.load()
    try:
        yield service
    finally:
        await loop.stop()
        await steps.stop()
        engines[0].close()
