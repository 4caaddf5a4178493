"""An engine that computes nothing, notes what it is asked for, and can be held inside a step."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence

from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.core.step import StepResult

PATIENCE_S = 30


class PlayedDesk:
    """Keeps nothing by name, unless told when something is due.

    Attributes:
        next_due_ns: When ``pass_time`` is due.
        num_passes: How often it was called.
        quotas: Those of the last hello.
        num_rests: How often it still has a use for a rest.
        on_rest: Called at each.
    """

    def __init__(self) -> None:
        self.num_rests = 0
        self.on_rest: Callable[[], None] = lambda: None
        self._rested = threading.Event()
        self.next_due_ns = 0
        self.num_passes = 0
        self.num_quota_changes = 0
        self.quotas: list[TenantQuota] = []

    def pass_time(self) -> bool:
        self.num_passes += 1
        self.next_due_ns = 0
        return True

    def use_rest(self) -> bool:
        self.num_rests = max(0, self.num_rests - 1)
        self.on_rest()
        if not self.num_rests:
            self._rested.set()
        return bool(self.num_rests)

    async def wait_rested(self) -> None:
        """Wait until it has had all the rest it has a use for, since the last call of this."""
        assert await asyncio.to_thread(self._rested.wait, PATIENCE_S)
        self._rested.clear()

    def replace_quotas(self, quotas: Sequence[TenantQuota]) -> None:
        self.quotas = list(quotas)


class PlayedEngine:
    """See the module text.

    Attributes:
        calls: What was asked for, in order.
        threads: Names of the threads that asked.
        failure: What the next step raises.
        violations: What integrity checks find.
        num_checks: How many there were.
        last_applied_step: As in the engine.
        num_free: Free blocks of its pool of 4.
        is_ahead: Whether a device computes its steps, so that one may follow another.
        flying: Steps that were launched and not collected.
    """

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.threads: set[str] = set()
        self.failure: BaseException | None = None
        self.violations: list[str] = []
        self.num_checks = 0
        self.last_applied_step = 0
        self.is_idle = True
        self.desk = PlayedDesk()
        self.num_free = 4
        self.is_ahead = self.takes_cores = False
        self.flying: deque[int] = deque()
        self.launching = self
        self.on_launch: Callable[[], None] = lambda: None
        self._entered = threading.Event()
        self._checked = threading.Event()
        self._gate = threading.Event()
        self._gate.set()

    def hold(self) -> None:
        """Keep the next step from ending."""
        self._entered.clear()
        self._gate.clear()

    def release(self) -> None:
        """Let the step end."""
        self._gate.set()

    async def wait_held(self) -> None:
        """Wait until a step has begun."""
        assert await asyncio.to_thread(self._entered.wait, PATIENCE_S)

    async def wait_checked(self) -> None:
        """Wait for an integrity check since the last call of this."""
        assert await asyncio.to_thread(self._checked.wait, PATIENCE_S)
        self._checked.clear()

    @property
    def num_in_flight(self) -> int:
        return len(self.flying)

    def may_follow(self, plan: StepPlan) -> bool:
        return self.is_ahead and len(self.flying) == 1 and plan.only_goes_on

    def launch(self, plan: StepPlan) -> None:
        self._note(("step", plan.step))
        self.on_launch()
        self._entered.set()
        self.flying.append(plan.step)
        self.last_applied_step = plan.step
        if not self.is_ahead:
            self.wait()

    def flight_under_way(self) -> "PlayedEngine | None":
        return self if self.is_ahead else None

    def wait(self) -> None:
        assert self._gate.wait(PATIENCE_S)

    def collect(self) -> StepResult:
        self.wait()
        step = self.flying.popleft()
        if self.is_ahead:
            self._note(("collected", step))
        if self.failure is not None:
            raise self.failure
        return StepResult(step=step, account=self.account())

    def cancel(self, sequence_ids: list[int]) -> StepResult:
        self._note(("cancel", sequence_ids))
        return StepResult(step=0, released=sequence_ids, account=self.account())

    def reset(self) -> None:
        self._note("reset")
        self.last_applied_step = 0

    def account(self) -> PoolAccount:
        self.threads.add(threading.current_thread().name)
        return PoolAccount(total=4, free=self.num_free, held=4 - self.num_free)

    def check_integrity(self) -> list[str]:
        self.threads.add(threading.current_thread().name)
        self.num_checks += 1
        self._checked.set()
        return self.violations

    def _note(self, call: object) -> None:
        self.threads.add(threading.current_thread().name)
        self.calls.append(call)
