"""The talking around the pure core: events in, ``Scheduler`` decides, plans and token events out.

Everything runs on one event loop, so the core needs no lock. Whatever happens (a submission, a
result, a deadline) ends in ``kick``, and one task sends what the core then has to say: cancels
first, then plans while it has any. Nothing awaits between asking the core and queueing its answer.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Protocol

import structlog

from pageframe.core.clock import Clock
from pageframe.core.errors import AbortedError, PageframeError, UnavailableError
from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount, ReplicaFacts, TenantQuota
from pageframe.core.request import Submission, TokenEvents
from pageframe.core.step import StepResult
from pageframe.core.terms import TenantTerms
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.metering import SchedulerMeter
from pageframe.telemetry.metrics import Reading

_log = structlog.get_logger(__name__)

_RECONNECT_DELAY_S = 0.05
_RECONNECT_DELAY_MAX_S = 1.0
# Answers to a first hello that trying again does not change.
_FINAL_REASONS = ("SCHEDULER_CONNECTED", "QUOTA_")

Deliver = Callable[[TokenEvents], None]


class ExecutorStream(Protocol):
    """A connection to an executor; ``client.GrpcExecutorStream`` is the one over the wire."""

    facts: ReplicaFacts
    pool: PoolAccount

    async def send_plan(self, plan: StepPlan) -> None:
        """Send one plan; raises ``PageframeError`` when the stream is lost."""
        ...

    async def send_cancel(self, sequence_ids: list[int]) -> None:
        """Have sequences ended at once; raises ``PageframeError`` when the stream is lost."""
        ...

    async def send_quotas(self, quotas: Sequence[TenantQuota]) -> None:
        """Bound tenants otherwise; raises ``PageframeError`` when the stream is lost."""
        ...

    def results(self) -> AsyncIterator[StepResult]:
        """Results in the order of their plans; raises ``PageframeError`` when it ends."""
        ...

    async def close(self) -> None:
        """End the stream."""
        ...


OpenStream = Callable[[int], Awaitable[ExecutorStream]]


class SchedulerLoop:
    """Owns the core and the stream to the executor; gateways attach with a callback.

    Args:
        open_stream: Connects to the executor under an epoch.
        make_scheduler: Builds the core from the facts of the first executor.
        clock: Source of time.

    Attributes:
        on_facts: Called when the executor serves something else than before: another one came,
            or its pool was resized.
        on_executor: Called with whether an executor is there, when one came or was lost.
        meter: Counts steps.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        *,
        make_scheduler: Callable[[ReplicaFacts], Scheduler],
        clock: Clock,
    ) -> None:
        self._open_stream = open_stream
        self._make_scheduler = make_scheduler
        self._clock = clock
        self._scheduler: Scheduler | None = None
        self.on_facts: Callable[[ReplicaFacts], None] = _ignore
        self.on_executor: Callable[[bool], None] = _ignore
        self.meter = SchedulerMeter()
        self._told_facts: ReplicaFacts | None = None
        self._stream: ExecutorStream | None = None
        self._quotas_to_send: Sequence[TenantQuota] | None = None
        self._kicked = asyncio.Event()
        self._first_facts = asyncio.Event()
        self._idle = asyncio.Event()
        self._num_results = 0
        self._runner: asyncio.Task[None] | None = None
        self._gateways: dict[int, Deliver] = {}
        self._deadline_timer = _Timer(clock, self._expire)
        self._plan_timer = _Timer(clock, self.kick)
        # Wall time keeps epochs rising over restarts without a file to remember them in.
        self._epoch = clock.now_ns()

    @property
    def scheduler(self) -> Scheduler:
        """The core.

        Raises:
            UnavailableError: no executor has connected yet.
        """
        if self._scheduler is None:
            raise UnavailableError("NO_EXECUTOR", "no executor has connected yet; try again")
        return self._scheduler

    @property
    def facts(self) -> ReplicaFacts:
        """What the executor serves, or served last.

        Raises:
            UnavailableError: no executor has connected yet.
        """
        return self.scheduler.facts

    def readings(self) -> Iterator[Reading]:
        """What is counted here, for metrics."""
        figures = None if self._scheduler is None else self._scheduler.figures()
        return self.meter.read(figures, is_connected=self.is_connected)

    @property
    def is_connected(self) -> bool:
        """Whether an executor is there now."""
        return self._stream is not None

    async def wait_first_executor(self) -> None:
        """Wait until facts are known."""
        await self._first_facts.wait()

    async def wait_idle(self) -> None:
        """Wait until no request lives."""
        while not self.scheduler.is_idle:
            self._idle.clear()
            await self._idle.wait()

    def attach(self, gateway: int, deliver: Deliver) -> None:
        """Have events of a gateway's requests delivered."""
        self._gateways[gateway] = deliver

    def detach(self, gateway: int) -> None:
        """Cancel all requests of a gateway and forget it."""
        self._gateways.pop(gateway, None)
        if self._scheduler is not None:
            self._deliver(self._scheduler.cancel_gateway(gateway))
            self.kick()

    def submit(self, gateway: int, submission: Submission) -> None:
        """Hand in a request.

        Raises:
            PageframeError: refused, with the numbers.
        """
        self.scheduler.submit(submission, gateway)
        # Sets the timer of its deadline, and hands out what has ended already: a resumed sample
        # may have all its tokens.
        self._expire()

    def cancel(self, gateway: int, handle: int, sample_index: int | None) -> None:
        """Take back a request, or one of its samples."""
        scheduler = self.scheduler
        if sample_index is None:
            self._deliver(scheduler.cancel(gateway, handle))
        else:
            self._deliver(scheduler.finish_sample(gateway, handle, sample_index))
        self.kick()

    def set_terms(self, terms: TenantTerms) -> None:
        """Tenants have other terms; a new stream begins with their quotas, this one hears them."""
        if self._scheduler is None:
            return
        self._quotas_to_send = terms.quotas
        self._deliver(self._scheduler.set_terms(terms, self._clock.now_ns()))
        self.kick()

    def kick(self) -> None:
        """Let the sender look whether the core has something to say."""
        self._kicked.set()

    async def start(self) -> None:
        """Begin to keep connected, and wait for the first executor.

        Raises:
            PageframeError: SCHEDULER_CONNECTED, when the executor serves another scheduler, or
                what is wrong with the quotas.
        """
        self._runner = asyncio.create_task(self._run())
        first = asyncio.create_task(self._first_facts.wait())
        await asyncio.wait((self._runner, first), return_when=asyncio.FIRST_COMPLETED)
        first.cancel()
        if self._runner.done():
            self._runner.result()

    async def wait_ended(self) -> None:
        """Wait until keeping connected has failed, and raise why; cancelling ends it.

        Raises:
            AbortedError: SCHEDULER_REPLACED, when another scheduler took its place.
        """
        assert self._runner is not None, "start comes first"
        await self._runner

    async def stop(self) -> None:
        """Let go of the executor."""
        assert self._runner is not None, "start comes first"
        self._runner.cancel()
        await asyncio.gather(self._runner, return_exceptions=True)

    async def _run(self) -> None:
        delay_s, told_reason = _RECONNECT_DELAY_S, ""
        while True:
            try:
                self._epoch = max(self._epoch + 1, self._clock.now_ns())
                stream = await self._open_stream(self._epoch)
            except PageframeError as error:
                if error.reason.startswith(_FINAL_REASONS) and self._scheduler is None:
                    raise
                # Wall time may have been set back since the scheduler before this one.
                self._epoch = max(self._epoch, int(error.limits.get("epoch_seen", 0)))
                is_starting = error.reason == "STARTING"
                if error.reason != told_reason:
                    # It is asked many times a second while it loads; one line says so.
                    told_reason = error.reason
                    log = _log.info if is_starting else _log.warning
                    log("executor_refused", reason=error.reason, message=error.message)
                if is_starting:
                    # It answers, and any moment it will serve: no reason to wait longer each time.
                    delay_s = _RECONNECT_DELAY_S
            else:
                num_results, told_reason = self._num_results, ""
                await self._use(stream)
                if self._num_results > num_results:
                    # It did work; one that greets and then fails is met with ever longer pauses.
                    delay_s = _RECONNECT_DELAY_S
                    continue
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _RECONNECT_DELAY_MAX_S)

    async def _use(self, stream: ExecutorStream) -> None:
        self._welcome(stream)
        tasks = [
            asyncio.create_task(self._send(stream)),
            asyncio.create_task(self._receive(stream)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        except PageframeError as error:
            _log.warning("executor_lost", reason=error.reason, message=error.message)
            if error.reason == "TAKEN_OVER":
                # Not by this process: it lets go of a stream before it opens another. Whoever is
                # newer stays, or both would drive each other out for ever.
                raise AbortedError(
                    "SCHEDULER_REPLACED",
                    "another scheduler has connected to the executor under this one's id and with "
                    f"a higher epoch than {self._epoch}; this one ends",
                    epoch=self._epoch,
                ) from error
        finally:
            self._stream = None
            self.on_executor(False)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._deliver(self.scheduler.on_executor_lost(self._clock.now_ns()))
            await stream.close()

    def _welcome(self, stream: ExecutorStream) -> None:
        if self._scheduler is None:
            self._scheduler = self._make_scheduler(stream.facts)
            self._first_facts.set()
        self._deliver(
            self._scheduler.on_executor_ready(stream.facts, stream.pool, self._clock.now_ns())
        )
        self._tell_facts()
        self._stream = stream
        self.on_executor(True)
        _log.info("executor_connected", epoch=self._epoch, model=stream.facts.model)
        self.kick()

    async def _receive(self, stream: ExecutorStream) -> None:
        scheduler = self.scheduler
        async for result in stream.results():
            self._num_results += 1
            self.meter.take(result)
            self._deliver(scheduler.on_result(result, self._clock.now_ns()))
            self._tell_facts()
            self.kick()

    async def _send(self, stream: ExecutorStream) -> None:
        scheduler = self.scheduler
        while True:
            await self._kicked.wait()
            self._kicked.clear()
            quotas, self._quotas_to_send = self._quotas_to_send, None
            if quotas is not None:
                await stream.send_quotas(quotas)
            cancels = scheduler.take_cancels()
            if cancels:
                await stream.send_cancel(cancels)
            while (plan := scheduler.plan(self._clock.now_ns())) is not None:
                await stream.send_plan(plan)
            self._plan_timer.set(scheduler.plan_due_ns(self._clock.now_ns()))

    def _tell_facts(self) -> None:
        facts = self.scheduler.facts
        if facts is not self._told_facts and facts != self._told_facts:
            self.on_facts(facts)
        self._told_facts = facts

    def _expire(self) -> None:
        """End what is too late, and come back when the next deadline passes."""
        self._deliver(self.scheduler.expire(self._clock.now_ns()))
        self._deadline_timer.set(self.scheduler.next_deadline_ns)
        self.kick()

    def _deliver(self, events: Iterable[tuple[int, TokenEvents]]) -> None:
        for gateway, gateway_events in events:
            deliver = self._gateways.get(gateway)
            if deliver is not None:
                deliver(gateway_events)
        if self.scheduler.is_idle:
            self._idle.set()


class _Timer:
    """Has something done at a time of the core's clock."""

    def __init__(self, clock: Clock, do: Callable[[], None]) -> None:
        self._clock = clock
        self._do = do
        self._handle: asyncio.TimerHandle | None = None

    def set(self, at_ns: int) -> None:
        """Do it then, and not when it was to be done; 0 for never."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if at_ns:
            delay_s = max(0, at_ns - self._clock.now_ns()) / NANOSECONDS_PER_SECOND
            self._handle = asyncio.get_running_loop().call_later(delay_s, self._do)


def _ignore(_news: object) -> None:
    """Nobody wants to know."""
