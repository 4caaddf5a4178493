"""Replays KV memory: the plans of a recorded run, applied to a fresh step engine.

The engine is the real one over a runner that gives the recorded tokens, so each result must be the
recorded one: who ran, who was refused and why, who lost how many blocks, and the pool after it.

A scheduler's journal does not say what others did to the pool: prefixes retained over
``KvMemoryService``, a resize, quotas set by hand, blocks of a session that another gateway keeps.
Where the pool turns out to be another one between steps, comparing ends there and says so.
"""

from collections import deque
from dataclasses import replace

from pageframe.core.errors import PageframeError
from pageframe.core.journal import Header
from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount, ReplicaFacts, TenantQuota
from pageframe.core.step import StepResult
from pageframe.core.trace import NullTraceSink
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.eviction import load_eviction_policy
from pageframe.executor.memory.retaining import SessionTimes
from pageframe.lab.replay_runner import ReplayRunner
from pageframe.scheduler.journal import HeldClock
from pageframe.scheduler.options import SchedulerOptions
from pageframe.wire.journal import result_digest, result_text


class MemoryReplay:
    """KV memory beside a replayed scheduler.

    Args:
        header: Of the journal.
        options: Of the recorded scheduler.

    Attributes:
        num_results: Results that were compared.
        num_same: Those that were the recorded ones.
        stopped: Empty, or why nothing is compared any more; a sentence.
        difference: The first result that was not the same, recorded and replayed; else None.
    """

    def __init__(self, header: Header, options: SchedulerOptions) -> None:
        self._setup = header.memory
        self._has_prefix_cache = options.shares_prefixes
        self._quotas: tuple[TenantQuota, ...] = options.quotas
        self._clock = HeldClock(0)
        self._plans: deque[StepPlan] = deque()
        self.num_results = 0
        self.num_same = 0
        self.stopped = ""
        self.difference: tuple[str, str] | None = None
        self._build(header.facts)

    def on_plan(self, plan: StepPlan) -> None:
        """The replayed scheduler sent a plan."""
        if not self.stopped:
            self._plans.append(plan)

    def on_quotas(self, quotas: tuple[TenantQuota, ...]) -> None:
        """Quotas were changed: between which steps the executor heard of it is not recorded."""
        if quotas != self._quotas and not self.stopped:
            self.stopped = "the quotas of tenants were changed while it ran"

    def on_lost(self) -> None:
        """What was on the wire is gone, and so is a step in flight: nobody heard of its end."""
        self._plans.clear()
        while self._engine.launching.num_in_flight:
            self._engine.collect()

    def on_ready(self, facts: ReplicaFacts, account: PoolAccount, now_ns: int) -> None:
        """An executor is there: the same one that forgot its sequences, or another."""
        if self.stopped:
            return
        self._clock.held_ns = now_ns
        if account.cached or account.pinned or account.host_used:
            self._engine.reset()
            self._engine.desk.replace_quotas(self._quotas)
        else:
            self._build(facts)
        self._compare_pool(account, "when the scheduler connected")

    def on_result(self, recorded: StepResult, now_ns: int) -> None:
        """The recorded executor answered: replay what it did before that, and compare."""
        if self.stopped or self.difference:
            return
        self._clock.held_ns = recorded.timing.start_ns or now_ns
        desk = self._engine.desk
        if desk.next_due_ns and desk.next_due_ns <= self._clock.held_ns:
            desk.pass_time()
        if recorded.step:
            if not (self._plans or self._engine.launching.num_in_flight):
                self.stopped = f"there is no plan for step {recorded.step}"
                return
            self._runner.recorded = recorded
            self._compare(recorded, self._replay(recorded))
        elif recorded.released:
            self._compare(recorded, self._engine.cancel(recorded.released))
        else:
            self._compare_pool(recorded.account, "when nothing ran")

    def _replay(self, recorded: StepResult) -> StepResult:
        """The same step, and the beginning of the next one where that followed before its end."""
        if not self._engine.launching.num_in_flight:
            self._runner.is_ahead = recorded.is_followed
            self._engine.launch(self._plans.popleft())
        if recorded.is_followed and self._plans:
            self._runner.is_ahead = True
            self._engine.launch(self._plans.popleft())
        return self._engine.collect()

    def close(self) -> None:
        """Give memory back."""
        self._engine.close()

    def _build(self, facts: ReplicaFacts) -> None:
        setup = self._setup
        self._runner = ReplayRunner(facts)
        self._engine = StepEngine(
            self._runner,
            num_blocks=facts.num_blocks,
            block_size=facts.block_size,
            max_num_sequences=facts.max_num_sequences,
            max_step_tokens=facts.max_step_tokens,
            max_model_len=facts.max_model_len,
            trace=NullTraceSink(),
            clock=self._clock,
            num_blocks_max=setup.num_blocks_max,
            num_host_slots=facts.num_host_blocks,
            has_prefix_cache=self._has_prefix_cache,
            eviction=load_eviction_policy(setup.eviction_policy or "lru"),
            session_times=SessionTimes(idle_ns=setup.session_idle_ns, ttl_ns=setup.session_ttl_ns),
        )
        self._runner.engine = self._engine
        self._engine.find_unready = self._runner.unready
        try:
            self._engine.desk.replace_quotas(self._quotas)
        except PageframeError as error:
            self.stopped = f"the quotas do not fit this pool: {error.message}"

    def _compare(self, recorded: StepResult, replayed: StepResult) -> None:
        self.num_results += 1
        if result_digest(recorded) == result_digest(replayed):
            self.num_same += 1
        elif _is_meddled_with(recorded, replayed):
            self._stop(recorded.account, f"before the end of step {recorded.step}")
        else:
            self.difference = (result_text(recorded), result_text(replayed))

    def _compare_pool(self, recorded: PoolAccount, when: str) -> None:
        if self._engine.account() != recorded:
            self._stop(recorded, when)

    def _stop(self, recorded: PoolAccount, when: str) -> None:
        self.stopped = (
            f"the pool was changed by somebody else {when}, "
            f"after {self.num_results} results: {recorded} is not {self._engine.account()}"
        )


def _is_meddled_with(recorded: StepResult, replayed: StepResult) -> bool:
    """Whether the step did the same, in a pool with other pins or of another size."""
    first, second = recorded.account, replayed.account
    shape = (first.pinned, first.total, first.host_total)
    return shape != (second.pinned, second.total, second.host_total) and result_digest(
        recorded
    ) == result_digest(replace(replayed, account=first))
