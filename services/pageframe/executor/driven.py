"""What the step thread drives: the engine, and the desk between its steps."""

from collections.abc import Callable, Sequence
from typing import Protocol

from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.core.step import StepResult
from pageframe.executor.batch import Flight


class Desk(Protocol):
    """The part of ``desk.MemoryDesk`` that this thread drives."""

    num_quota_changes: int
    """How often somebody has set a quota."""

    @property
    def next_due_ns(self) -> int:
        """When ``pass_time`` is next due; 0 for never."""
        ...

    def pass_time(self) -> bool:
        """Let go of what has expired; whether anything changed."""
        ...

    def use_rest(self) -> bool:
        """Do a little that can wait; whether there is more."""
        ...

    def replace_quotas(self, quotas: Sequence[TenantQuota]) -> None:
        """Bound all tenants anew."""
        ...


class Launching(Protocol):
    """The part of ``launching.Launching`` that this thread asks."""

    @property
    def num_in_flight(self) -> int:
        """Steps that have been launched and not collected."""
        ...

    def may_follow(self, plan: StepPlan) -> bool:
        """Whether a plan may be launched though the step before it has not been collected."""
        ...

    def flight_under_way(self) -> Flight | None:
        """That of the step launched last; None where it is over already."""
        ...


class Engine(Protocol):
    """The part of ``engine.StepEngine`` that this thread drives."""

    @property
    def desk(self) -> Desk:
        """What may be done to KV memory between steps."""
        ...

    on_launch: Callable[[], None]
    """Called in each step that runs, just before the model does."""

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is known."""
        ...

    @property
    def last_applied_step(self) -> int:
        """Number of the last step that was applied in this epoch; 0 before the first."""
        ...

    @property
    def launching(self) -> Launching:
        """Steps in flight."""
        ...

    def step(self, plan: StepPlan) -> StepResult:
        """Apply a plan and compute its step: ``launch`` and ``collect``, with none in flight."""
        ...

    def launch(self, plan: StepPlan) -> None:
        """Apply a plan and begin its step."""
        ...

    def collect(self) -> StepResult:
        """Wait for the step launched first of those in flight, and take in its tokens."""
        ...

    def cancel(self, sequence_ids: list[int]) -> StepResult:
        """End sequences between steps."""
        ...

    def reset(self) -> None:
        """Forget all sequences; their blocks pass the fence."""
        ...

    def account(self) -> PoolAccount:
        """Count blocks by state."""
        ...

    def check_integrity(self) -> Sequence[object]:
        """Recompute the pool from nothing and return what is wrong."""
        ...
