"""Layers with windows give up what no later token sees, and the model's tokens stay the same."""

import pytest

from exactness.questions import MAX_NEW_TOKENS
from pageframe.core.clock import ManualClock
from pageframe.core.plan import Announcement, Recovery, StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import RefusedBecause, StepResult
from pageframe.core.trace import KvCause
from pageframe.core.units import ceil_div
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.model.loader import load_runner
from unit.memory.kv_records import RecordingSink

GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS, ignore_eos=True)
CHUNK = 16


class Engine:
    """A step engine over a tiny model, driven by plans of one entry."""

    def __init__(
        self, exam, runner: str, *, num_blocks: int, block_size: int, num_host_slots: int = 0
    ) -> None:
        loaded = load_runner(str(exam.folder), runner=runner, device="cpu", dtype="float32")
        self.sink = RecordingSink()
        self.window_tokens = loaded.facts.window_tokens
        self.engine = StepEngine(
            loaded,
            num_blocks=num_blocks,
            num_host_slots=num_host_slots,
            block_size=block_size,
            max_num_sequences=2,
            max_step_tokens=64,
            max_model_len=512,
            trace=self.sink,
            clock=ManualClock(),
            check_every_step=True,
        )
        self.num_held_max = 0

    def plan(self) -> StepPlan:
        last = self.engine.last_applied_step
        return StepPlan(step=last + 1, builds_on=last)

    def step(self, plan: StepPlan) -> StepResult:
        result = self.engine.step(plan)
        assert not result.refusal
        assert self.engine.check_integrity() == []
        self.num_held_max = max(self.num_held_max, result.account.held)
        return result

    def announce(self, sequence_id: int, prompt: list[int]) -> StepResult:
        plan = self.plan()
        plan.announce.append(
            Announcement(
                sequence_id=sequence_id,
                token_ids=prompt,
                num_prompt_tokens=len(prompt),
                sampling=GREEDY,
            )
        )
        return self.step(plan)

    def advance(self, sequence_id: int, num_tokens: int, generation: int = 0) -> StepResult:
        """Admit it, or let it go on."""
        plan = self.plan()
        plan.may.add(sequence_id, generation, num_tokens)
        return self.step(plan)

    def finish(self, sequence_id: int, generation: int = 0) -> list[int]:
        """Its output, to the end."""
        token_ids: list[int] = []
        while len(token_ids) < MAX_NEW_TOKENS:
            result = self.advance(sequence_id, CHUNK, generation)
            is_promoting = result.refused_because == [RefusedBecause.PROMOTING]
            assert result.computed_ids or result.sampled_ids or is_promoting, "it does not move"
            token_ids += result.token_ids
        return token_ids

    def num_left_behind(self) -> int:
        """Blocks given up because of a window."""
        return sum(
            len(record.block_ids)
            for record in self.sink.records
            if record.operation.name == "RELEASE" and record.cause.name == "WINDOW"
        )


def _assert_answer(token_ids, question) -> None:
    certain = question.answer.num_certain
    assert certain > MAX_NEW_TOKENS // 2
    assert token_ids[:certain] == question.answer.token_ids[:certain]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(
    ("name", "runner"),
    [("mistral", "native"), ("mistral", "transformers"), ("mixtral", "transformers")],
)
def test_a_sequence_outgrows_the_pool_that_holds_its_window(exam_of, name, runner, block_size):
    exam = exam_of(name)
    question = exam.questions[0]
    window = {"mistral": 11, "mixtral": 13}[name]
    # A chunk, the positions before it that its first token sees, and a ragged edge.
    num_blocks = ceil_div(window - 1 + CHUNK + block_size - 1, block_size)
    pool = Engine(exam, runner, num_blocks=num_blocks, block_size=block_size)
    assert pool.window_tokens == window
    num_tokens = len(question.prompt) + MAX_NEW_TOKENS
    assert num_blocks * block_size < num_tokens // 4
    pool.announce(1, question.prompt)
    _assert_answer(pool.finish(1), question)
    # All but the last token are written, and the next one would see ``window`` of them with itself.
    assert pool.num_left_behind() == (num_tokens - window) // block_size
    assert pool.num_held_max <= num_blocks
    assert pool.engine.is_idle
    assert pool.engine.account().held == 0
    pool.engine.close()


MIXED = [
    # Family, runner, and the window of each group of layers.
    ("qwen2", "native", (0, 9, 9)),
    ("qwen2", "transformers", (0, 9, 9)),
    ("gemma2", "transformers", (0, 13)),
    ("gemma3", "transformers", (0, 9, 9)),
]


def _num_held(windows: tuple[int, ...], num_computed: int, block_size: int) -> int:
    """Blocks that a sequence needs to go on: of each group, those that the next token sees."""
    end = ceil_div(num_computed, block_size)
    firsts = [
        max(0, num_computed - window + 1) // block_size if window else 0 for window in windows
    ]
    return sum(end - first for first in firsts)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("name", "runner", "windows"), MIXED)
def test_layers_that_differ_keep_what_each_of_them_sees(exam_of, name, runner, windows, block_size):
    exam = exam_of(name)
    question = exam.questions[0]
    # All but the last token are written.
    num_written = len(question.prompt) + MAX_NEW_TOKENS - 1
    num_logical = ceil_div(num_written, block_size)
    # While a chunk is computed, a group with a window has the chunk and what its first token sees.
    num_blocks = sum(
        min(num_logical, ceil_div(window - 1 + CHUNK + block_size - 1, block_size))
        if window
        else num_logical
        for window in windows
    )
    assert num_blocks < 0.6 * len(windows) * num_logical
    pool = Engine(exam, runner, num_blocks=num_blocks, block_size=block_size)
    assert pool.engine.memory.options.group_windows == windows
    pool.announce(1, question.prompt)
    _assert_answer(pool.finish(1), question)
    assert pool.num_left_behind() == sum(
        max(0, num_written - window + 1) // block_size for window in windows if window
    )
    # With one group it would be ``num_logical`` blocks of all layers, that is of each group.
    assert pool.num_held_max == max(
        _num_held(windows, num_computed, block_size) for num_computed in range(1, num_written)
    )
    assert pool.engine.account().held == 0
    pool.engine.close()


@pytest.mark.parametrize("recovery", Recovery, ids=lambda recovery: recovery.name)
@pytest.mark.parametrize(
    ("name", "runner", "windows", "block_size"),
    [(*MIXED[0], 1), (*MIXED[0], 4), (*MIXED[2], 4), (*MIXED[3], 1)],
)
def test_giving_way_in_all_groups_changes_no_token(
    exam_of, name, runner, windows, block_size, recovery
):
    exam = exam_of(name)
    victim, beneficiary = exam.questions[6], exam.questions[3]
    assert len(victim.prompt) == 63
    num_held, num_asked = _num_held(windows, 48, block_size), 48 // block_size * len(windows)
    pool = Engine(
        exam,
        runner,
        num_blocks=num_held + _num_held(windows, 16, block_size) + num_asked - 1,
        block_size=block_size,
        num_host_slots=400,
    )
    pool.announce(1, victim.prompt)
    for _ in range(3):
        pool.advance(1, 16)
    assert pool.engine.account().held == num_held
    pool.announce(2, beneficiary.prompt)
    pool.advance(2, 16)
    plan = pool.plan()
    # One block is lacking, and the other gives way.
    plan.must.add(2, 0, 48)
    plan.victims.add(1, 0, recovery, num_blocks=1)
    result = pool.step(plan)
    assert result.preempted_ids == [1]
    # What a tail computes again would see what has left the window.
    taken = Recovery.RECOMPUTE if recovery is Recovery.TAIL else recovery
    assert result.preempted_recoveries == [taken]
    assert result.preempted_num_blocks == [num_held]
    _assert_answer(pool.finish(2), beneficiary)
    _assert_answer(pool.finish(1, generation=1), victim)
    seen = {record.operation.name for record in pool.sink.records}
    assert ({"SWAP_OUT", "SWAP_IN"} <= seen) == (recovery is Recovery.SWAP)
    pool.engine.close()


@pytest.mark.parametrize("recovery", Recovery, ids=lambda recovery: recovery.name)
def test_giving_way_behind_a_window_changes_no_token(exam_of, recovery):
    exam = exam_of("mistral")
    # Near the end of its prompt: what goes wrong long before it is forgotten by the answer.
    victim, beneficiary = exam.questions[6], exam.questions[3]
    assert len(victim.prompt) == 63
    pool = Engine(exam, "native", num_blocks=12, block_size=4)
    pool.announce(1, victim.prompt)
    for _ in range(7):
        pool.advance(1, 8)
    # Of 14 blocks 11 have left the window of 11 positions.
    assert pool.engine.account().held == 3
    pool.announce(2, beneficiary.prompt)
    pool.advance(2, 8)
    plan = pool.plan()
    # Eight blocks more, with seven available: the other gives way, by one block or by all.
    plan.must.add(2, 0, 32)
    plan.victims.add(1, 0, recovery, num_blocks=1)
    result = pool.step(plan)
    assert result.preempted_ids == [1]
    _assert_answer(pool.finish(2), beneficiary)
    _assert_answer(pool.finish(1, generation=1), victim)
    pool.engine.close()


def test_a_second_asking_shares_what_is_left_and_has_the_same_answer(exam_of):
    exam = exam_of("mistral")
    question = exam.questions[0]
    pool = Engine(exam, "native", num_blocks=100, block_size=4)
    answers = []
    for sequence_id in (1, 2):
        pool.announce(sequence_id, question.prompt)
        answers.append(pool.finish(sequence_id))
        _assert_answer(answers[-1], question)
    assert answers[0] == answers[1]
    shared = [record for record in pool.sink.records if record.operation.name == "SHARE"]
    # Of the whole prompt but its last token, what the token behind it sees.
    first = ((len(question.prompt) - 1) // 4 * 4 - 11 + 1) // 4
    assert [len(record.block_ids) for record in shared] == [
        ceil_div(len(question.prompt) - 1, 4) - first
    ]
    pool.engine.close()


@pytest.mark.parametrize(("name", "runner", "windows"), MIXED[1:])
def test_a_second_asking_does_without_the_head_of_groups_with_a_window(
    exam_of, name, runner, windows
):
    exam = exam_of(name)
    question = exam.questions[0]
    pool = Engine(exam, runner, num_blocks=400, block_size=4)
    pool.announce(1, question.prompt)
    answers = [pool.finish(1)]
    # What left a window is the oldest that is cached; take half of it.
    num_gone = pool.num_left_behind() // 2
    pool.engine.memory.pool.evict(num_gone, Purpose(KvCause.POOL_PRESSURE))
    result = pool.announce(2, question.prompt)
    assert result.num_cached_tokens == [len(question.prompt) - 1]
    answers.append(pool.finish(2))
    assert answers[0] == answers[1]
    _assert_answer(answers[1], question)
    pool.engine.close()
