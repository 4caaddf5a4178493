"""Random plans over shared memory: forks, hits, all recoveries, a host tier, resizes, cancels.

Prompts begin with one of few texts, so everybody finds what others computed. Each child of a fork
samples tokens of its own, so a write into a block that is shared comes out as a wrong token.
The seed stands in the name of a failed test: that name alone runs it again.
"""

import random
from dataclasses import dataclass, field

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.errors import PageframeError
from pageframe.core.plan import Announcement, Fork, Recovery, StepPlan
from pageframe.core.step import StepResult
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.eviction import CostAwareEviction, LruEviction
from pageframe.executor.memory.retaining import SessionTimes
from unit.executor.fake_runner import FakeRunner
from unit.executor.played_drafter import PlayedDrafter, sometimes
from unit.executor.test_engine_random import (
    MAX_NUM_STEPS,
    RandomScheduler,
    View,
    compare_with_reference,
    state_of,
)
from unit.memory.kv_records import RecordingSink, ReplayedPool


@dataclass
class Seen:
    """What happened at least once in a run."""

    names: set[str] = field(default_factory=set)

    def note(self, sink: RecordingSink, start: int) -> None:
        self.names.update(record.operation.name for record in sink.records[start:])


class SharingScheduler(RandomScheduler):
    """Forks, takes all recoveries, and sends prompts that begin alike."""

    def __init__(self, seed: int, **sizes) -> None:
        self.parent_of: dict[int, tuple[int, int]] = {}
        super().__init__(seed, **sizes)

    def _request(self, sequence_id: int, num_slots: int) -> Announcement:
        base = super()._request(sequence_id, num_slots)
        tokens = list(base.token_ids)
        common = [self.random.randrange(2) + 7] * len(tokens)
        num_common = self.random.choice([0, len(tokens) // 2, len(tokens) - 1, len(tokens)])
        return Announcement(
            sequence_id=sequence_id,
            token_ids=common[:num_common] + tokens[num_common:],
            num_prompt_tokens=base.num_prompt_tokens,
            sampling=base.sampling,
            cache_salt=self.random.choice([b"a", b"a", b"b"]),
            tenant=self.random.choice(["alice", "bob"]),
            session_id=self.random.choice(["", "", "chat"]),
        )

    def plan(self) -> StepPlan:
        plan = super().plan()
        recoveries = [Recovery.RECOMPUTE, Recovery.SWAP, Recovery.TAIL]
        for index in range(len(plan.victims)):
            plan.victims.recoveries[index] = self.random.choice(recoveries)
            plan.victims.num_blocks[index] = self.random.randint(0, 3)
        for sequence_id, view in self.living(running=True):
            if self.random.random() < 0.15 and len(self.parent_of) < 30:
                self._fork(plan, sequence_id, view)
        return plan

    def _fork(self, plan: StepPlan, sequence_id: int, view: View) -> None:
        child_ids = [
            1000 + len(self.parent_of) + index for index in range(self.random.randint(1, 3))
        ]
        for index, child_id in enumerate(child_ids, start=1):
            self.parent_of[child_id] = (sequence_id, index)
        plan.forks.append(
            Fork(
                parent_id=sequence_id,
                generation=view.generation,
                child_ids=child_ids,
                sample_indices=list(range(1, len(child_ids) + 1)),
                span_ids=[0] * len(child_ids),
            )
        )

    def read(self, result: StepResult) -> None:
        for child_id in result.forked_ids:
            self.views[child_id] = self._child(child_id)
        super().read(result)
        kept = zip(result.preempted_ids, result.preempted_num_computed, strict=True)
        for sequence_id, num_computed in kept:
            if num_computed:
                self.views[sequence_id].is_running = True

    def _child(self, child_id: int) -> View:
        parent_id, sample_index = self.parent_of[child_id]
        parent = self.views[parent_id]
        request = parent.announcement
        return View(
            Announcement(
                sequence_id=child_id,
                token_ids=[*request.token_ids, *parent.output],
                num_prompt_tokens=request.num_prompt_tokens,
                sampling=request.sampling,
                sample_index=sample_index,
            ),
            is_running=True,
            is_announced=True,
        )


def change_size(engine: StepEngine, scheduler: SharingScheduler, num_blocks: int) -> None:
    """Ask for some size; what is refused must have changed nothing."""
    wanted = scheduler.random.randint(1, num_blocks + 4)
    engine.publisher.catch_up()
    before = state_of(engine)
    try:
        outcome = engine.desk.resize(wanted)
    except PageframeError:
        assert state_of(engine) == before
    else:
        assert outcome.account.total == wanted


@pytest.mark.parametrize("has_drafts", [False, True], ids=["", "drafts"])
@pytest.mark.parametrize("has_lookahead", [False, True], ids=["", "lookahead"])
@pytest.mark.parametrize("num_host_slots", [0, 3, 40])
@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 23), (4, 7), (16, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_shared_memory_never_changes_a_token(
    seed, block_size, num_blocks, num_host_slots, has_lookahead, has_drafts
):
    scheduler = SharingScheduler(
        seed,
        num_blocks=num_blocks,
        block_size=block_size,
        has_lookahead=has_lookahead,
        has_drafts=has_drafts,
    )
    sink, clock = RecordingSink(), ManualClock()
    replayed = ReplayedPool(num_blocks, num_blocks + 4)
    engine = StepEngine(
        FakeRunner(),
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_sequences=5,
        max_step_tokens=40,
        max_model_len=200,
        trace=sink,
        clock=clock,
        num_blocks_max=num_blocks + 4,
        num_host_slots=num_host_slots,
        eviction=CostAwareEviction() if seed % 2 else LruEviction(),
        session_times=SessionTimes(idle_ns=50, ttl_ns=200),
        drafter=PlayedDrafter(
            sometimes(random.Random(seed), 0.7),
            lambda sequence_id: scheduler.parent_of.get(sequence_id, (0, 0))[1],
        ),
    )
    seen = Seen()
    for number in range(MAX_NUM_STEPS):
        # Else what the step before has filled is published first.
        if is_up_to_date := number % 2 == 0:
            engine.publisher.catch_up()
        before, num_records = state_of(engine), len(sink.records)
        clock.advance_ns(1)
        if scheduler.random.random() < 0.02:
            change_size(engine, scheduler, num_blocks)
            before, num_records = state_of(engine), len(sink.records)
        if engine.desk.next_due_ns and engine.desk.next_due_ns <= clock.now_ns():
            assert engine.desk.pass_time()
            before, num_records = state_of(engine), len(sink.records)
        plan = scheduler.plan()
        result = engine.step(plan)
        assert engine.check_integrity() == []
        assert engine.last_failure is None
        replayed.replay(sink.records)
        replayed.assert_equals(engine.memory.pool)
        if result.refusal and is_up_to_date:
            assert state_of(engine) == before
            assert len(sink.records) == num_records
        seen.note(sink, num_records)
        scheduler.sent(plan, result)
        if scheduler.random.random() < 0.01:
            scheduler.read(engine.cancel([scheduler.random.choice([*scheduler.views])]))
        if scheduler.is_done:
            break
    else:
        engine.desk.resize(num_blocks + 4)
    assert scheduler.is_done
    engine.cancel(scheduler.views)
    assert engine.is_idle
    clock.advance_ns(10_000)
    engine.desk.pass_time()
    assert engine.check_integrity() == []
    assert engine.account().held == 0
    assert {"SHARE", "INDEX", "RELEASE"} <= seen.names
    assert has_drafts == bool(scheduler.num_accepted)
    compare_with_reference(scheduler)
