"""The one thread that owns the engine: commands in, results out.

The event loop's thread only receives and sends. Everything that touches KV memory or tensors
happens here, in the order in which commands were posted, cancels first: they must not wait behind
plans that are already here, only behind the step that runs.

The scheduler hears of every change of the pool: in the result of a step, or in a report of its own
when an operator, another backend or the passing of time has changed something between steps.

When the next plan is here already, a result is handed over once that plan's step is launched: the
loop's thread then encodes and sends it while the model runs without the interpreter lock, and does
not compete for the lock with the work between two steps.

A step that a device computes by itself is waited for by another thread, ``lookout``, so that the
next plan may be launched behind it as soon as it is here. What cannot follow it, whatever is not a
plan among them, waits until it is collected.
"""

import asyncio
import collections
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog

from pageframe.config.cores import give_way, go_first
from pageframe.core.clock import Clock, SystemClock
from pageframe.core.errors import PageframeError
from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.core.step import StepResult
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.executor.driven import Engine
from pageframe.executor.lookout import Lookout

_log = structlog.get_logger(__name__)

_REST_SECONDS = 0.01


@dataclass(eq=False, slots=True)
class Session:
    """One scheduler's stream. Results of a closed session go nowhere; its plans are dropped.

    ``deliver`` is called on the step thread with each result and the last applied step.
    """

    deliver: Callable[[StepResult, int], None]
    is_open: bool = True
    cancels: collections.deque[int] = field(default_factory=collections.deque)

    def close(self) -> None:
        """Stop: plans that wait are dropped, results are not delivered."""
        self.is_open = False


_Command = Callable[[], None]
_Result = TypeVar("_Result")


class StepThread:
    """Runs an engine on its own thread. All methods but ``run`` are called on the event loop.

    Args:
        loop: Whose thread calls.
        clock: What is due goes by it.
        rest_seconds: How long nothing has come when what can wait is done.

    Attributes:
        on_result: Called on this thread with the result of each step; None while nobody wants to
            know. May be set on any thread.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Clock | None = None,
        *,
        rest_seconds: float = _REST_SECONDS,
    ) -> None:
        self._loop = loop
        self._clock = clock or SystemClock()
        self._rest_seconds = rest_seconds
        self._on_change: Callable[[], None] | None = None
        self.on_result: Callable[[StepResult], None] | None = None
        self._session: Session | None = None
        self._told = PoolAccount()
        self._num_quota_changes_told = 0
        self._inbox: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="step", daemon=True)
        self._ended: asyncio.Future[None] = loop.create_future()
        self._engine: Engine
        self._is_built = False
        self._is_unchecked = False
        self._held: tuple[Session, StepResult, int] | None = None
        # Whose the steps in flight are, and how many of all that were launched are collected.
        self._flying: collections.deque[Session] = collections.deque()
        self._num_landed = 0
        self._lookout = Lookout(self._post_landing)

    async def start(self, build: Callable[[], Engine]) -> None:
        """Start the thread and build the engine on it.

        Built there and nowhere else: a thread that once ran a parallel region keeps its own team
        of workers, and a second team would compete with the first for the same cores.

        Raises:
            Exception: whatever ``build`` raises.
        """

        def set_engine() -> None:
            self._engine = build()
            self._engine.on_launch = self._hand_over
            self._is_built = True

        self._thread.start()
        await self.call(set_engine)

    def post_plan(self, session: Session, plan: StepPlan) -> None:
        """Queue a plan; its result goes to ``session.deliver``."""
        self._inbox.put(lambda: self._step(session, plan))

    def post_cancel(self, session: Session, sequence_ids: list[int]) -> None:
        """End sequences before the next plan, or at once when at rest."""
        session.cancels.extend(sequence_ids)
        self._inbox.put(lambda: self._cancel(session))

    def post_quotas(self, session: Session, quotas: Sequence[TenantQuota]) -> None:
        """Bound tenants otherwise before the next plan, or at once when at rest."""

        def replace_quotas() -> None:
            self._land_all()
            self._hand_over()
            if session is not self._session or not session.is_open:
                return
            try:
                self._engine.desk.replace_quotas(quotas)
            except PageframeError as error:
                _log.error("quotas_refused", reason=error.reason, message=error.message)

        self._inbox.put(replace_quotas)

    async def take_over(self, session: Session, quotas: Sequence[TenantQuota]) -> PoolAccount:
        """Forget all sequences once the running step is done; returns the pool after it.

        Raises:
            PageframeError: the quotas are not sound; those before them hold on.
        """

        def reset() -> PoolAccount:
            self._engine.reset()
            self._engine.desk.replace_quotas(quotas)
            self._session, self._told = session, self._engine.account()
            return self._told

        return await self.call(reset)

    def watch(self, on_change: Callable[[], None] | None) -> None:
        """Call ``on_change`` on this thread after each command; None for no more of that."""
        self._on_change = on_change

    async def account(self) -> PoolAccount:
        """Count blocks by state, between steps."""
        return await self.call(self._engine.account)

    async def call(self, function: Callable[[], _Result]) -> _Result:
        """Run ``function`` on the step thread, between steps, and return what it returns."""
        future: asyncio.Future[_Result] = self._loop.create_future()

        def command() -> None:
            self._land_all()
            self._hand_over()
            try:
                result = function()
            except Exception as error:
                self._post(_fail, future, error)
            else:
                self._post(_succeed, future, result)
            self._report_change()

        self._inbox.put(command)
        return await future

    async def wait_ended(self) -> None:
        """Wait until the thread ends; raises what ended it."""
        await asyncio.shield(self._ended)

    async def stop(self) -> None:
        """End the thread after the commands posted so far."""
        if self._thread.is_alive():
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        # The engine is built here, so the threads of its kernels go first with this one.
        go_first()
        try:
            while (command := self._next_command()) is not None:
                command()
                if self._on_change is not None:
                    self._on_change()
            self._land_all()
            self._hand_over()
        except BaseException as error:
            _log.exception("step_thread_failed")
            self._post(_fail, self._ended, error)
        else:
            self._post(_succeed, self._ended, None)
        finally:
            self._lookout.close()

    def _next_command(self) -> _Command | None:
        try:
            return self._inbox.get_nowait()
        except queue.Empty:
            self._hand_over()
            if self._flying:
                return self._inbox.get()
        # The last result has yet to be sent, by a thread that needs the interpreter for it, and
        # whoever gets it may have more to ask: none of them waits for what can wait.
        with contextlib.suppress(queue.Empty):
            return self._inbox.get(timeout=self._seconds_until_due(most=self._rest_seconds))
        self._check_at_rest()
        self._use_rest()
        try:
            return self._inbox.get(timeout=self._seconds_until_due())
        except queue.Empty:
            return self._pass_time

    def _seconds_until_due(self, most: float | None = None) -> float | None:
        """How long to wait for a command, ``most`` or less; None for as long as it takes."""
        due_ns = self._engine.desk.next_due_ns if self._is_built else 0
        if not due_ns:
            return most
        due = max(0, due_ns - self._clock.now_ns()) / NANOSECONDS_PER_SECOND
        return due if most is None else min(most, due)

    def _pass_time(self) -> None:
        due_ns = self._engine.desk.next_due_ns
        if due_ns and due_ns <= self._clock.now_ns():
            self._land_all()
            if self._engine.desk.pass_time():
                self._report_change()

    def _report_change(self) -> None:
        """Tell the scheduler of a pool that no result has told it about."""
        if self._session is None or not self._session.is_open:
            return
        account, num_changes = self._engine.account(), self._engine.desk.num_quota_changes
        if account != self._told or num_changes != self._num_quota_changes_told:
            self._num_quota_changes_told = num_changes
            self._hold(self._session, StepResult(step=0, account=account))
            self._hand_over()

    def _check_at_rest(self) -> None:
        """Law 7: prove conservation whenever work has come to rest, once for each rest."""
        if self._is_unchecked and self._engine.is_idle:
            self._is_unchecked = False
            for violation in self._engine.check_integrity():
                _log.error("integrity_violation", violation=str(violation))

    def _use_rest(self) -> None:
        """Do what can wait, until something comes."""
        while self._is_built and self._inbox.empty() and self._engine.is_idle:
            if not self._engine.desk.use_rest():
                return

    def _step(self, session: Session, plan: StepPlan) -> None:
        if not session.is_open:
            return
        self._cancel(session)
        self._pass_time()
        if self._flying and not self._engine.launching.may_follow(plan):
            self._land_all()
        self._flying.append(session)
        self._engine.launch(plan)
        self._land_all(but=1)
        flight = self._engine.launching.flight_under_way()
        if flight is None:
            self._land_all()
            return
        if flight.takes_cores:
            # What this thread does beside it can wait for a core that is offered.
            give_way()
        self._lookout.watch(self._num_landed + len(self._flying), flight.wait)

    def _land_all(self, but: int = 0) -> None:
        """Collect the steps in flight, ``but`` so many."""
        while len(self._flying) > but:
            self._num_landed += 1
            self._end_step(self._flying.popleft(), self._engine.collect())

    def _post_landing(self, number: int) -> None:
        """The step that was launched as the ``number``-th is over. Called by the lookout."""
        if self._num_landed >= number:
            return  # It is waited for already, by who launched the next one.

        def land() -> None:
            if self._num_landed < number:
                self._land_all(but=self._num_landed + len(self._flying) - number)

        self._inbox.put(land)

    def _end_step(self, session: Session, result: StepResult) -> None:
        self._is_unchecked = True
        if (on_result := self.on_result) is not None:
            on_result(result)
        self._hold(session, result)
        if self._flying or self._inbox.empty():
            self._hand_over()

    def _cancel(self, session: Session) -> None:
        sequence_ids = list(session.cancels)
        session.cancels.clear()
        if sequence_ids and session.is_open:
            self._land_all()
            self._hold(session, self._engine.cancel(sequence_ids))
            self._hand_over()

    def _hold(self, session: Session, result: StepResult) -> None:
        """Keep a result to hand over, behind the one that may be kept already."""
        self._hand_over()
        self._told = result.account
        self._held = (session, result, self._engine.last_applied_step)

    def _hand_over(self) -> None:
        """Deliver the result that is kept, unless its session was closed meanwhile."""
        if self._held is not None:
            session, result, last_applied_step = self._held
            self._held = None
            if session.is_open:
                session.deliver(result, last_applied_step)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _fail(future: "asyncio.Future[Any]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _succeed(future: "asyncio.Future[Any]", result: object) -> None:
    if not future.done():
        future.set_result(result)
