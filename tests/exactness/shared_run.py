"""A tiny model under random plans that use everything KV memory can do, and what came of it.

The plans are those of ``unit.executor.test_engine_sharing_random``: forks, all recoveries, hits,
cancels, resizes. There a runner without a model watches the bookkeeping; here real keys and values
are copied, swapped and moved, and each token is compared with Hugging Face's, or with the same
sequence alone.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from exactness.questions import MAX_NEW_TOKENS, NUM_TOKENS_MAX, Exam, Question
from pageframe.core.clock import ManualClock
from pageframe.core.plan import Announcement, StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, StepResult
from pageframe.core.trace import NullTraceSink
from pageframe.core.units import ceil_div
from pageframe.executor.batch import ModelRunner
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.retaining import SessionTimes
from pageframe.executor.model.loader import load_runner
from unit.executor.test_engine_random import View
from unit.executor.test_engine_sharing_random import SharingScheduler, change_size
from unit.memory.kv_records import RecordingSink

NUM_STEPS_MAX = 4000
LOGPROB_ERROR_MAX = 2e-4
_MAX_NUM_SEQUENCES = 8
_MAX_STEP_TOKENS = 256
_CHUNK_GROWTH_MAX = 12
_NUM_SPARE_BLOCKS = 4
_FORK_IN_PROMPT_SHARE = 0.2
_FORK_GREEDY_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Where a run takes place; the pool holds one longest question and a quarter of another.

    So it does in each group of layers.

    Attributes:
        runner: ``native`` or ``transformers``.
        block_size: Tokens per block.
        num_host_tokens: Tokens that the host tier holds.
        has_lookahead: Whether plans are made before the last result is read.
        seed: Of all that is random.
    """

    runner: str
    block_size: int
    num_host_tokens: int
    has_lookahead: bool
    seed: int

    @property
    def num_blocks(self) -> int:
        """Logical blocks that the pool holds at first."""
        return ceil_div(NUM_TOKENS_MAX * 5 // 4, self.block_size) + 1


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        seen: How often each operation and each cause stands in the trace, by name.
        num_compared: Tokens compared, by what they were compared with.
        num_whole: Sequences that came to their end.
    """

    seen: Counter[str] = field(default_factory=Counter)
    num_compared: Counter[str] = field(default_factory=Counter)
    num_whole: int = 0


class AskingScheduler(SharingScheduler):
    """Asks the questions of an exam, greedily or sampling, in chunks of some dozen tokens."""

    def __init__(self, exam: Exam, world: World) -> None:
        self.questions = exam.questions
        self.question_of: dict[int, Question] = {}
        self.first_turn_of: dict[int, int] = {}
        self.logprobs: dict[int, list[float]] = {}
        super().__init__(
            world.seed,
            num_blocks=world.num_blocks,
            block_size=world.block_size,
            has_lookahead=world.has_lookahead,
        )

    def _request(self, sequence_id: int, num_slots: int) -> Announcement:
        turn_of_asking, place = divmod(sequence_id - 1, len(self.questions))
        question = self.question_of[sequence_id] = self.questions[place]
        if question.turn == 2:
            first = next(i for i, q in enumerate(self.questions) if q.chat == question.chat)
            self.first_turn_of[sequence_id] = turn_of_asking * len(self.questions) + first + 1
        # The second turn of a chat was made from a greedy answer to the first.
        is_greedy = question.chat or self.random.random() < 0.2
        sampling = self._greedy() if is_greedy else self._sampling()
        num_resumed = self.random.choice([0, 0, 2]) if sampling.is_greedy else 0
        return Announcement(
            sequence_id=sequence_id,
            token_ids=question.prompt + question.answer.token_ids[:num_resumed],
            num_prompt_tokens=len(question.prompt),
            sampling=sampling,
            cache_salt=b"a" if question.chat else self.random.choice([b"a", b"a", b"b"]),
            tenant=self.random.choice(["alice", "bob"]),
            session_id=f"chat {question.chat}.{turn_of_asking}" if question.chat else "",
        )

    def _greedy(self) -> SamplingParams:
        return SamplingParams(
            temperature=0.0, max_tokens=MAX_NEW_TOKENS, ignore_eos=True, num_logprobs=0
        )

    def _sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.random.choice([0.7, 1.0, 2.0]),
            top_k=self.random.choice([0, 20]),
            top_p=self.random.choice([1.0, 0.9]),
            repetition_penalty=self.random.choice([1.0, 1.1]),
            seed=self.random.getrandbits(64),
            max_tokens=self.random.randint(3, MAX_NEW_TOKENS),
            ignore_eos=True,
            num_logprobs=0,
        )

    def _announce(self, plan: StepPlan) -> None:
        unknown = [
            view
            for sequence_id, view in self.views.items()
            if not view.is_announced and self._may_begin(sequence_id)
        ]
        for view in unknown[: self.random.choice([0, 0, 1, 2])]:
            plan.announce.append(view.announcement)

    def _may_begin(self, sequence_id: int) -> bool:
        first = self.first_turn_of.get(sequence_id)
        return first is None or self.views[first].is_over

    def plan(self) -> StepPlan:
        plan = super().plan()
        for entries in (plan.must, plan.may):
            entries.num_tokens = [
                num_tokens * self.random.randint(1, _CHUNK_GROWTH_MAX)
                for num_tokens in entries.num_tokens
            ]
        return plan

    def _fork(self, plan: StepPlan, sequence_id: int, view: View) -> None:
        # Most steps of a prompt take no token, and a fork there is refused. Children of a greedy
        # parent say what it says itself.
        is_greedy = view.announcement.sampling.is_greedy
        share = _FORK_GREEDY_SHARE if is_greedy else 1.0
        share *= 1.0 if view.output else _FORK_IN_PROMPT_SHARE
        if self.random.random() < share:
            super()._fork(plan, sequence_id, view)

    def read(self, result: StepResult) -> None:
        super().read(result)
        for place, sequence_id in enumerate(result.sampled_ids):
            self.logprobs.setdefault(sequence_id, []).append(result.logprobs[place].logprob)

    def _child(self, child_id: int) -> View:
        self.question_of[child_id] = self.question_of[self.parent_of[child_id][0]]
        return super()._child(child_id)


def run(exam: Exam, world: World) -> Outcome:
    """Ask everything under random plans and compare every token; the pool has to end empty."""
    print(f"world: {world}, pool of {world.num_blocks} logical blocks")
    scheduler = AskingScheduler(exam, world)
    runner = _load(exam, world.runner, _MAX_NUM_SEQUENCES)
    sink, clock, outcome = RecordingSink(), ManualClock(), Outcome()
    num_groups = runner.facts.num_kv_groups
    engine = StepEngine(
        runner,
        num_blocks=world.num_blocks * num_groups,
        block_size=world.block_size,
        max_num_sequences=_MAX_NUM_SEQUENCES,
        max_step_tokens=_MAX_STEP_TOKENS,
        max_model_len=512,
        trace=sink,
        clock=clock,
        num_blocks_max=world.num_blocks * num_groups + _NUM_SPARE_BLOCKS,
        num_host_slots=ceil_div(world.num_host_tokens, world.block_size) * num_groups,
        session_times=SessionTimes(idle_ns=20, ttl_ns=300),
    )
    for _ in range(NUM_STEPS_MAX):
        clock.advance_ns(1)
        _between_steps(engine, scheduler, clock)
        plan = scheduler.plan()
        result = engine.step(plan)
        assert engine.last_failure is None
        assert engine.check_integrity() == []
        scheduler.sent(plan, result)
        if scheduler.random.random() < 0.005:
            scheduler.read(engine.cancel([scheduler.random.choice([*scheduler.views])]))
        if scheduler.is_done:
            break
    assert scheduler.is_done, f"no end after {NUM_STEPS_MAX} steps"
    engine.cancel(scheduler.views)
    clock.advance_ns(10_000)
    engine.desk.pass_time()
    assert engine.check_integrity() == []
    assert engine.account().held == 0
    engine.close()
    for record in sink.records:
        outcome.seen.update([record.operation.name, f"because {record.cause.name}"])
    _compare(exam, world, scheduler, outcome)
    return outcome


def _between_steps(engine: StepEngine, scheduler: AskingScheduler, clock: ManualClock) -> None:
    if scheduler.random.random() < 0.1:
        change_size(engine, scheduler, engine.memory.pool.num_blocks_max - _NUM_SPARE_BLOCKS)
    if engine.desk.next_due_ns and engine.desk.next_due_ns <= clock.now_ns():
        assert engine.desk.pass_time()


class Alone:
    """One sequence after another, each alone in a roomy pool that shares nothing."""

    def __init__(self, exam: Exam, runner: str) -> None:
        loaded = _load(exam, runner, 1)
        self._engine = StepEngine(
            loaded,
            num_blocks=32 * loaded.facts.num_kv_groups,
            block_size=16,
            max_num_sequences=1,
            max_step_tokens=512,
            max_model_len=512,
            trace=NullTraceSink(),
            clock=ManualClock(),
            has_prefix_cache=False,
        )
        self._num_asked = 0

    def answer(self, announcement: Announcement) -> list[int]:
        """The whole output of a sequence, as far as ``announcement`` lacks it."""
        self._num_asked += 1
        plan = StepPlan(step=self._engine.last_applied_step + 1, builds_on=0)
        plan.builds_on = plan.step - 1
        plan.announce.append(
            replace(announcement, sequence_id=self._num_asked, session_id="", generation=0)
        )
        plan.may.add(self._num_asked, 0, len(announcement.token_ids))
        token_ids: list[int] = []
        reasons: list[int] = [FinishReason.NONE]
        while reasons[-1] == FinishReason.NONE:
            result = self._engine.step(plan)
            token_ids += result.token_ids
            reasons += result.finish_reasons
            plan = StepPlan(step=plan.step + 1, builds_on=plan.step)
        assert reasons[-1] == FinishReason.LENGTH
        return token_ids

    def close(self) -> None:
        self._engine.close()


def _compare(exam: Exam, world: World, scheduler: AskingScheduler, outcome: Outcome) -> None:
    """Every token with Hugging Face's, or the same sequence's alone; and all log-probabilities."""
    alone = Alone(exam, world.runner)
    for sequence_id, view in scheduler.views.items():
        request, question = view.announcement, scheduler.question_of[sequence_id]
        delivered = [*request.token_ids[request.num_prompt_tokens :], *view.output]
        if view.finish_reason:
            assert view.finish_reason == FinishReason.LENGTH, sequence_id
            assert len(delivered) == request.sampling.max_tokens, sequence_id
            outcome.num_whole += 1
        if not view.output:
            continue
        if request.sampling.is_greedy:
            num_certain = question.answer.num_certain
            wanted = question.answer.token_ids[:num_certain]
            assert delivered[:num_certain] == wanted[: len(delivered)], sequence_id
            outcome.num_compared["Hugging Face"] += min(num_certain, len(delivered))
        else:
            assert view.output == alone.answer(request)[: len(view.output)], sequence_id
            kind = "child alone" if request.sample_index else "alone"
            outcome.num_compared[kind] += len(view.output)
        told = scheduler.logprobs[sequence_id]
        wanted_logprobs = exam.logprobs([*request.token_ids, *view.output], len(request.token_ids))
        assert told == pytest.approx(wanted_logprobs, abs=LOGPROB_ERROR_MAX), sequence_id
    alone.close()


def _load(exam: Exam, runner: str, max_num_sequences: int) -> ModelRunner:
    return load_runner(
        str(exam.folder),
        runner=runner,
        device="cpu",
        dtype="float32",
        max_num_sequences=max_num_sequences,
    )
