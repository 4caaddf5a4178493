"""An engine and a runner that go wrong at random, and tell of every broken invariant."""

import random
from collections.abc import Callable

from pageframe.core.clock import ManualClock
from pageframe.core.plan import StepPlan
from pageframe.core.step import StepResult
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.executor.batch import StepBatch, StepOutput
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.integrity import Violation
from pageframe.executor.model.sim import SimConfig, SimRunner

_SLOW_S = 0.3


class FaultyRunner(SimRunner):
    """The sim runner; its steps may be slow, or fail before or after the model has run.

    Args:
        config: The model.
        clock: Moved ahead by each step.
        random_source: Draws.
        slow_probability: Of a step to be slow.
        failure_probability: Of a step to fail.
    """

    def __init__(
        self,
        config: SimConfig,
        clock: ManualClock,
        random_source: random.Random,
        *,
        slow_probability: float,
        failure_probability: float,
    ) -> None:
        super().__init__(config, clock)
        self._steps_clock = clock
        self._random = random_source
        self._slow_probability = slow_probability
        self._failure_probability = failure_probability

    def execute(self, batch: StepBatch) -> StepOutput:
        """Run a step, or fail.

        Raises:
            RuntimeError: by chance.
        """
        draw = self._random.random()
        if self._random.random() < self._slow_probability:
            self._steps_clock.advance_ns(round(_SLOW_S * NANOSECONDS_PER_SECOND))
        if draw < self._failure_probability / 2:
            raise RuntimeError("drawn to fail before the model has run")
        output = super().execute(batch)
        if draw < self._failure_probability:
            raise RuntimeError("drawn to fail after the model has run")
        return output


class WatchedEngine(StepEngine):
    """An engine that reports broken invariants, and refuses plans for nothing.

    Attributes:
        on_violation: Called with every violation.
        refuses: Draws whether the next plan is refused.
    """

    on_violation: Callable[[str], None]
    refuses: Callable[[], bool]

    def step(self, plan: StepPlan) -> StepResult:
        """Apply a plan, or refuse it as if its blocks could not be had."""
        memory = self.memory
        if plan.step == memory.last_received_step + 1 and self.refuses():
            memory.last_received_step = plan.step
            return StepResult(step=plan.step, refusal="DRAWN", account=self.account())
        result = super().step(plan)
        if not result.account.is_conserved:
            self.on_violation(f"step {plan.step}: {result.account} is not conserved")
        return result

    def check_integrity(self) -> list[Violation]:
        """Recompute conservation; a violation is one of the simulation, too."""
        violations = super().check_integrity()
        for violation in violations:
            self.on_violation(f"integrity: {violation}")
        return violations
