"""A model of windows throughout gives up what no later token sees, and its tokens stay the same."""

import pytest

from exactness.questions import MAX_NEW_TOKENS
from pageframe.core.clock import ManualClock
from pageframe.core.plan import Announcement, Recovery, StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import StepResult
from pageframe.core.units import ceil_div
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.loader import load_runner
from unit.memory.kv_records import RecordingSink

GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS, ignore_eos=True)
CHUNK = 16


class Engine:
    """A step engine over a tiny model, driven by plans of one entry."""

    def __init__(self, exam, runner: str, *, num_blocks: int, block_size: int) -> None:
        loaded = load_runner(str(exam.folder), runner=runner, device="cpu", dtype="float32")
        self.sink = RecordingSink()
        self.window_tokens = loaded.facts.window_tokens
        self.engine = StepEngine(
            loaded,
            num_blocks=num_blocks,
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

    def announce(self, sequence_id: int, prompt: list[int]) -> None:
        plan = self.plan()
        plan.announce.append(
            Announcement(
                sequence_id=sequence_id,
                token_ids=prompt,
                num_prompt_tokens=len(prompt),
                sampling=GREEDY,
            )
        )
        self.step(plan)

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
            assert result.computed_ids or result.sampled_ids, "it does not move"
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


@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_layers_with_different_windows_keep_every_block(exam_of, runner):
    exam = exam_of("qwen2")
    question = exam.questions[0]
    num_blocks = ceil_div(len(question.prompt) + MAX_NEW_TOKENS, 4)
    pool = Engine(exam, runner, num_blocks=num_blocks, block_size=4)
    assert pool.window_tokens == 0
    pool.announce(1, question.prompt)
    _assert_answer(pool.finish(1), question)
    assert pool.num_left_behind() == 0
    # All but the last token are written.
    assert pool.num_held_max == ceil_div(len(question.prompt) + MAX_NEW_TOKENS - 1, 4)
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
    # The whole prompt but its last token, of which all blocks outside the window go at once.
    assert [len(record.block_ids) for record in shared] == [ceil_div(len(question.prompt) - 1, 4)]
    pool.engine.close()
