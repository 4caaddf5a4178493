"""An executor that lets a scheduler in, keeps what it sends, and answers when the test says so."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from pageframe.core.errors import PageframeError
from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount, ReplicaFacts, TenantQuota
from pageframe.core.step import StepResult
from pageframe.testing.fake_engine import FakeEngine, make_facts

PATIENCE_S = 30


class PlayedStream:
    """One connection, over an engine that starts empty.

    Attributes:
        facts: What is served.
        pool: As of the connection.
        engine: Answers plans.
        is_closed: Whether the scheduler let go of it.
        quotas: As they were sent last; None before that.
    """

    def __init__(self, facts: ReplicaFacts) -> None:
        self.facts = facts
        self.engine = FakeEngine(facts)
        self.pool: PoolAccount = self.engine.account()
        self.is_closed = False
        self.quotas: tuple[TenantQuota, ...] | None = None
        self._sent: asyncio.Queue[StepPlan | list[int]] = asyncio.Queue()
        self._results: asyncio.Queue[StepResult | Exception | None] = asyncio.Queue()

    async def send_plan(self, plan: StepPlan) -> None:
        self._sent.put_nowait(plan)

    async def send_cancel(self, sequence_ids: list[int]) -> None:
        self._sent.put_nowait(sequence_ids)

    async def send_quotas(self, quotas: Sequence[TenantQuota]) -> None:
        self.quotas = tuple(quotas)

    async def results(self) -> AsyncIterator[StepResult]:
        while (result := await self._results.get()) is not None:
            if isinstance(result, Exception):
                raise result
            yield result

    async def close(self) -> None:
        self.is_closed = True

    # What the test does.

    @property
    def is_quiet(self) -> bool:
        """Whether nothing was sent that was not taken."""
        return self._sent.empty()

    async def take(self) -> StepPlan | list[int]:
        """The next message: a plan, or the ids of a cancel."""
        return await asyncio.wait_for(self._sent.get(), PATIENCE_S)

    async def take_plan(self) -> StepPlan:
        message = await self.take()
        assert isinstance(message, StepPlan), f"a cancel came: {message}"
        return message

    async def take_cancel(self) -> list[int]:
        """The next cancel; plans before it are answered."""
        while isinstance(message := await self.take(), StepPlan):
            self.answer(message)
        return message

    def answer(self, message: StepPlan | list[int]) -> None:
        """Do what a message says and tell the outcome."""
        is_plan = isinstance(message, StepPlan)
        self.tell(self.engine.step(message) if is_plan else self.engine.cancel(message))

    def tell(self, result: StepResult | Exception | None) -> None:
        """Send a result; an error ends the stream with it, and None ends it well."""
        self._results.put_nowait(result)

    async def serve(self) -> None:
        """Answer whatever comes, until cancelled."""
        while True:
            self.answer(await self._sent.get())


@dataclass
class PlayedExecutor:
    """Opens streams.

    Attributes:
        facts: What it serves.
        refusals: What the next attempts to connect are answered with.
        epochs: With which epochs it was asked.
        is_away: Whether attempts hang.
    """

    facts: ReplicaFacts = field(default_factory=make_facts)
    refusals: deque[PageframeError] = field(default_factory=deque)
    epochs: list[int] = field(default_factory=list)
    is_away: bool = False

    def __post_init__(self) -> None:
        self._opened: asyncio.Queue[PlayedStream] = asyncio.Queue()
        self._asked: asyncio.Queue[int] = asyncio.Queue()
        self._back = asyncio.Event()

    async def open(self, epoch: int) -> PlayedStream:
        self.epochs.append(epoch)
        self._asked.put_nowait(epoch)
        if self.refusals:
            raise self.refusals.popleft()
        if self.is_away:
            await self._back.wait()
        stream = PlayedStream(self.facts)
        self._opened.put_nowait(stream)
        return stream

    def come_back(self) -> None:
        """Let in who waits."""
        self.is_away = False
        self._back.set()

    async def asked(self) -> int:
        """The epoch of the next attempt to connect, whatever became of it."""
        return await asyncio.wait_for(self._asked.get(), PATIENCE_S)

    async def opened(self) -> PlayedStream:
        """The next stream that was opened."""
        return await asyncio.wait_for(self._opened.get(), PATIENCE_S)
