"""Random plans over a pool that is nearly always too small, against sequences that run alone.

The seed stands in the name of a failed test: that name alone runs it again.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.plan import Announcement, DraftBounds, Fork, Recovery, StepPlan
from pageframe.core.replica import PoolAccount
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import StepResult
from pageframe.executor.engine import StepEngine
from unit.executor.fake_runner import VOCAB_SIZE, FakeRunner, reference_output
from unit.executor.played_drafter import PlayedDrafter, sometimes
from unit.memory.kv_records import RecordingSink, ReplayedPool

NUM_SEQUENCES = 24
MAX_NUM_STEPS = 4000


@dataclass
class View:
    """What a scheduler knows of one sequence from the results that it has read."""

    announcement: Announcement
    generation: int = 0
    is_running: bool = False
    is_announced: bool = False
    output: list[int] = field(default_factory=list)
    finish_reason: int = 0
    is_aborted: bool = False

    @property
    def is_over(self) -> bool:
        return bool(self.finish_reason) or self.is_aborted


class RandomScheduler:
    """Makes plans at random; with ``has_lookahead`` it plans before it reads the last result."""

    def __init__(
        self,
        seed: int,
        *,
        num_blocks: int,
        block_size: int,
        has_lookahead: bool,
        has_drafts: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.has_drafts = has_drafts
        self.has_lookahead = has_lookahead
        self.views: dict[int, View] = {}
        self.next_step = 1
        self.builds_on = 0
        self.unread: list[StepResult] = []
        self.num_preemptions = 0
        self.num_refused_plans = 0
        self.num_stale = 0
        self.num_accepted: list[int] = []
        num_slots = num_blocks * block_size
        for sequence_id in range(1, NUM_SEQUENCES + 1):
            self.views[sequence_id] = View(self._request(sequence_id, num_slots))

    def _request(self, sequence_id: int, num_slots: int) -> Announcement:
        num_prompt = self.random.randint(1, max(1, num_slots // 2))
        num_known = num_prompt + self.random.choice([0, 0, 2])
        room = max(1, num_slots - num_known)
        return Announcement(
            sequence_id=sequence_id,
            token_ids=[self.random.randrange(VOCAB_SIZE) for _ in range(num_known)],
            num_prompt_tokens=num_prompt,
            sampling=SamplingParams(
                max_tokens=num_known - num_prompt + self.random.randint(1, min(room, 12)),
                min_tokens=self.random.choice([0, 1]),
                ignore_eos=self.random.random() < 0.5,
                stop_token_ids=tuple(self.random.sample(range(VOCAB_SIZE), 2)),
            ),
        )

    def living(self, *, running: bool) -> list[tuple[int, View]]:
        chosen = [
            (sequence_id, view)
            for sequence_id, view in self.views.items()
            if view.is_announced and not view.is_over and view.is_running == running
        ]
        self.random.shuffle(chosen)
        return chosen

    def plan(self) -> StepPlan:
        plan = StepPlan(step=self.next_step, builds_on=self.builds_on)
        self._announce(plan)
        # Who is named is not drafted for.
        chance = 0.3 if self.has_drafts else 0.8
        for sequence_id, view in self.living(running=True):
            if self.random.random() < chance:
                plan.must.add(sequence_id, view.generation, self.random.randint(1, 7))
            elif self.random.random() < 0.5:
                plan.may.add(sequence_id, view.generation, self.random.randint(1, 7))
        if self.random.random() < 0.9:
            for sequence_id, view in self.living(running=True):
                plan.victims.add(sequence_id, view.generation, Recovery.RECOMPUTE)
        for sequence_id, view in self.living(running=False):
            if self.random.random() < 0.4:
                plan.may.add(sequence_id, view.generation, self.random.randint(1, 7))
        for sequence_id, view in self.living(running=self.random.random() < 0.5)[:1]:
            if self.random.random() < 0.01:
                view.is_aborted = True
                plan.finish.append(sequence_id)
        if self.has_drafts:
            plan.drafts = DraftBounds(
                num_tokens=self.random.randint(0, 12),
                num_tokens_each=self.random.randint(1, 6),
                num_blocks=self.random.randint(0, 5),
            )
        self._spoil(plan)
        return plan

    def _announce(self, plan: StepPlan) -> None:
        unknown = [view for view in self.views.values() if not view.is_announced]
        for view in unknown[: self.random.choice([0, 0, 1, 2])]:
            plan.announce.append(view.announcement)

    def _spoil(self, plan: StepPlan) -> None:
        """Now and then say something wrong."""
        if self.random.random() < 0.1:
            entries = self.random.choice([plan.must, plan.may])
            entries.add(self.random.randint(1, 2 * NUM_SEQUENCES), self.random.choice([-1, 99]), 3)
        spoilers: list[Callable[[], None]] = [
            lambda: setattr(plan, "builds_on", plan.builds_on - 1),
            lambda: setattr(plan, "step", plan.step + 1),
            lambda: plan.forks.append(
                Fork(parent_id=1, generation=99, child_ids=[1000], sample_indices=[1], span_ids=[0])
            ),
        ]
        if self.random.random() < 0.05:
            self.random.choice(spoilers)()

    def sent(self, plan: StepPlan, result: StepResult) -> None:
        """Take note that the plan went out; its result is read now, or one step late."""
        if result.refusal != "STEP_OUT_OF_ORDER":
            self.next_step = plan.step + 1
        if not result.refusal:
            self.builds_on = plan.step
        self.unread.append(result)
        while len(self.unread) > self.has_lookahead:
            self.read(self.unread.pop(0))
        if not result.refusal:
            for announcement in plan.announce:
                self.views[announcement.sequence_id].is_announced = True

    def read(self, result: StepResult) -> None:
        self.num_refused_plans += bool(result.refusal)
        self.num_stale += len(result.stale_ids)
        self.num_preemptions += len(result.preempted_ids)
        self.num_accepted += result.num_accepted
        preempted = zip(result.preempted_ids, result.preempted_generations, strict=True)
        for sequence_id, generation in preempted:
            self.views[sequence_id].generation = generation
            self.views[sequence_id].is_running = False
        for sequence_id in result.computed_ids:
            self.views[sequence_id].is_running = True
        sampled = zip(result.sampled_ids, result.token_ids, result.finish_reasons, strict=True)
        for sequence_id, token_id, reason in sampled:
            view = self.views[sequence_id]
            view.output.append(token_id)
            view.finish_reason = reason
        for sequence_id in result.released:
            self.views[sequence_id].is_aborted = True

    @property
    def is_done(self) -> bool:
        return all(view.is_over for view in self.views.values())


def state_of(engine: StepEngine) -> tuple:
    """What a refused plan must leave alone."""
    memory = engine.memory
    return (
        memory.pool.columns.states.tobytes(),
        memory.pool.columns.ref_counts.tobytes(),
        memory.pool.supply.free_ids().tobytes(),
        memory.tables.num_blocks.tobytes(),
        memory.sequences.num_tokens.tobytes(),
        memory.sequences.num_computed.tobytes(),
        memory.sequences.running_rows().tobytes(),
        [(s.sequence_id, s.generation, s.row) for s in memory.sequences.all()],
        engine.last_applied_step,
    )


@pytest.mark.parametrize("has_drafts", [False, True], ids=["", "drafts"])
@pytest.mark.parametrize("has_lookahead", [False, True], ids=["", "lookahead"])
@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 23), (4, 6), (16, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_preempted_refused_and_stale_work_never_changes_a_token(
    seed, block_size, num_blocks, has_lookahead, has_drafts
):
    scheduler = RandomScheduler(
        seed,
        num_blocks=num_blocks,
        block_size=block_size,
        has_lookahead=has_lookahead,
        has_drafts=has_drafts,
    )
    sink, replayed = RecordingSink(), ReplayedPool(num_blocks)
    engine = StepEngine(
        FakeRunner(),
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_sequences=5,
        max_step_tokens=40,
        max_model_len=200,
        trace=sink,
        has_prefix_cache=False,
        clock=ManualClock(),
        check_every_step=False,
        drafter=PlayedDrafter(sometimes(random.Random(seed), 0.7)),
    )
    for _ in range(MAX_NUM_STEPS):
        before, num_records = state_of(engine), len(sink.records)
        plan = scheduler.plan()
        result = engine.step(plan)
        assert engine.check_integrity() == []
        assert engine.last_failure is None
        assert result.account.is_conserved
        replayed.replay(sink.records)
        replayed.assert_equals(engine.memory.pool)
        if result.refusal:
            assert state_of(engine) == before
            assert len(sink.records) == num_records
        scheduler.sent(plan, result)
        if scheduler.random.random() < 0.005:
            scheduler.read(engine.cancel([scheduler.random.randint(1, 2 * NUM_SEQUENCES)]))
        if scheduler.is_done:
            break
    assert scheduler.is_done
    engine.cancel(scheduler.views)
    assert engine.is_idle
    assert engine.account() == PoolAccount(total=num_blocks, free=num_blocks)
    assert scheduler.num_preemptions > 0
    assert scheduler.num_refused_plans > 0
    assert scheduler.num_stale > 0
    assert has_drafts == any(scheduler.num_accepted)
    compare_with_reference(scheduler)


def compare_with_reference(scheduler: RandomScheduler) -> None:
    num_whole = 0
    for sequence_id, view in scheduler.views.items():
        request = view.announcement
        output, reason = reference_output(
            list(request.token_ids),
            request.num_prompt_tokens,
            request.sampling,
            200,
            request.sample_index,
        )
        num_resumed = len(request.token_ids) - request.num_prompt_tokens
        delivered = [*request.token_ids[request.num_prompt_tokens :], *view.output]
        assert delivered == output[: len(delivered)], sequence_id
        assert len(view.output) <= len(output) - num_resumed
        if view.finish_reason:
            assert delivered == output, sequence_id
            assert view.finish_reason == reason, sequence_id
            num_whole += 1
    assert num_whole > NUM_SEQUENCES // 2
