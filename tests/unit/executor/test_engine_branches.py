"""Branches in the engine: beams that report candidates, share blocks, part and end."""

import numpy as np
import pytest

from pageframe.core.plan import Branches, Recovery, Victims
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import Candidates, FinishReason
from pageframe.core.trace import KvCause
from pageframe.executor.memory.purpose import Purpose
from unit.executor.fake_runner import make_candidates, next_token
from unit.executor.small_engine import SmallEngine, request
from unit.memory.memories import entries

SIX = [10, 11, 12, 13, 14, 15]
EIGHT = [*SIX, 16, 17]
BEAM = SamplingParams(max_tokens=40, num_candidates=3)


def beam(sequence_id: int, token_ids=SIX, **changes):
    return request(sequence_id, token_ids, sampling=BEAM, **changes)


def branches(*rows: tuple[int, int, int]) -> Branches:
    """Rows of parent, child and token, all of generation 0."""
    made = Branches()
    for parent_id, child_id, token_id in rows:
        made.add(parent_id, 0, child_id, token_id)
    return made


def expected(token_ids: list[int]) -> Candidates:
    return make_candidates(next_token(np.array(token_ids)), 3)


def test_it_reports_candidates_and_takes_no_token():
    small = SmallEngine()
    result = small.start(beam(1), request(2, SIX[:3]))
    assert result.candidates == {1: expected(SIX)}
    assert (result.sampled_ids, small.tokens(1)) == ([2], SIX)
    assert small.num_computed(1) == 6
    # Nobody says how it goes on: it waits.
    assert small.step().sampled_ids == [2]
    assert small.num_computed(1) == 6


def test_children_share_all_blocks_and_all_but_one_copy_the_last():
    small = SmallEngine()
    small.start(beam(1))
    assert small.table(1) == [0, 1]
    small.records()
    result = small.step(branches=branches((1, 2, 50), (1, 3, 51)))
    assert result.candidates == {2: expected([*SIX, 50]), 3: expected([*SIX, 51])}
    assert (small.table(2), small.table(3)) == ([0, 2], [0, 1])
    assert result.released == [1]
    assert small.records() == [
        ("SHARE", "FORK", (0, 1), ()),
        ("SHARE", "FORK", (0, 1), ()),
        ("RELEASE", "FINISHED", (0, 1), ()),
        ("ALLOCATE", "DECODE", (2,), ()),
        ("COPY_ON_WRITE", "DECODE", (1,), (2,)),
        ("RELEASE", "DECODE", (1,), ()),
    ]


def test_a_parent_may_go_on_in_its_place_while_another_ends():
    small = SmallEngine()
    small.start(beam(1))
    small.step(branches=branches((1, 2, 50), (1, 3, 51)))
    result = small.step(branches=branches((3, 3, 60), (3, 4, 61)), finish=[2])
    assert small.tokens(3) == [*SIX, 51, 60]
    assert small.tokens(4) == [*SIX, 51, 61]
    assert result.candidates == {3: expected(small.tokens(3)), 4: expected(small.tokens(4))}
    # Block 2 was that of the one that ended; it is free only when nobody may touch it.
    assert (small.table(3), small.table(4)) == ([0, 2], [0, 1])
    assert result.released == [2]
    assert small.runner.rows[small.memory.sequences.get(3).row] == small.tokens(3)


def test_at_the_end_of_a_block_each_gets_a_new_one_and_nothing_is_copied():
    small = SmallEngine()
    small.start(beam(1, EIGHT))
    result = small.step(branches=branches((1, 2, 50), (1, 3, 51), (1, 4, 52)))
    assert [small.table(number) for number in (2, 3, 4)] == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    assert result.account.held == 5


def test_what_does_not_fit_is_refused_and_changes_nothing():
    small = SmallEngine(num_blocks=4)
    small.start(beam(1), request(2, SIX[:3]))
    plan = branches((1, 3, 50), (1, 4, 51), (1, 5, 52))
    # Blocks 0 and 1 are those of 1, and 2 is that of 2: one is left, two copies are needed.
    assert small.step(branches=plan).refusal == "MUST_DOES_NOT_FIT"
    assert (small.tokens(1), small.table(1)) == (SIX, [0, 1])
    assert small.memory.sequences.get(3) is None
    victims = Victims()
    victims.add(2, 0, Recovery.RECOMPUTE, 1)
    result = small.step(branches=plan, victims=victims)
    assert result.preempted_ids == [2]
    assert sorted(result.candidates) == [3, 4, 5]


def test_a_victim_does_not_branch():
    small = SmallEngine(num_blocks=4)
    small.start(beam(1), request(2, SIX[:3]))
    victims = Victims()
    victims.add(1, 0, Recovery.RECOMPUTE, 2)
    result = small.step(branches=branches((1, 3, 50), (1, 4, 51), (1, 5, 52)), victims=victims)
    assert (result.preempted_ids, result.candidates) == ([1], {})
    assert result.sampled_ids == [2]
    assert small.memory.sequences.get(3) is None
    assert small.tokens(1) == SIX


def test_rows_of_those_that_end_are_there_for_children():
    small = SmallEngine(num_rows=2)
    small.start(beam(1))
    small.step(branches=branches((1, 2, 50), (1, 3, 51)))
    result = small.step(branches=branches((2, 2, 60), (2, 4, 61)), finish=[3])
    assert sorted(result.candidates) == [2, 4]
    plan = branches((2, 2, 70), (2, 5, 71), (4, 4, 72))
    assert small.step(branches=plan).refusal == "ROWS_EXCEEDED"
    assert small.step(branches=branches((2, 2, 70), (4, 4, 72))).refusal == ""


@pytest.mark.parametrize("generation", [1, 7])
def test_a_parent_of_another_generation_is_stale(generation):
    small = SmallEngine()
    small.start(beam(1))
    plan = Branches([1], [generation], [2], [50])
    result = small.step(branches=plan)
    assert (result.stale_ids, result.candidates) == ([1], {})
    assert small.tokens(1) == SIX


def test_one_that_has_not_computed_its_tokens_does_not_branch():
    small = SmallEngine()
    small.step(announce=[beam(1)], may=entries((1, 0, 4)))
    assert small.step(branches=branches((1, 2, 50))).stale_ids == [1]


def test_a_token_that_is_none_is_refused():
    small = SmallEngine()
    small.start(beam(1))
    assert small.step(branches=branches((1, 2, 97))).refusal == "BRANCH_OUT_OF_RANGE"
    assert small.step(branches=branches((1, 2, 96))).refusal == ""


def test_a_step_of_too_many_tokens_is_refused():
    small = SmallEngine(num_rows=80, num_blocks=80)
    small.start(beam(1))
    plan = branches(*((1, 2 + number, 50) for number in range(65)))
    assert small.step(branches=plan).refusal == "STEP_TOKENS_EXCEEDED"


def test_a_step_that_fails_ends_all_beams_with_an_error():
    small = SmallEngine()
    small.start(beam(1))
    small.runner.fail_next = True
    result = small.step(branches=branches((1, 2, 50), (1, 3, 51)))
    assert result.sampled_ids == [2, 3]
    assert result.finish_reasons == [FinishReason.ERROR] * 2
    assert result.account.held == 0


def test_a_child_that_the_runner_does_not_take_ends_and_the_others_go_on():
    small = SmallEngine()
    small.start(beam(1))
    admit, taken = small.runner.admit, []

    def admit_once(row, **arguments):
        if taken:
            taken.clear()
            small.runner.rows[row] = []
            raise ValueError("no")
        taken.append(row)
        admit(row, **arguments)

    small.runner.admit = admit_once
    result = small.step(branches=branches((1, 2, 50), (1, 3, 51)))
    assert (result.sampled_ids, result.token_ids) == ([3], [-1])
    assert list(result.candidates) == [2]
    assert result.account.held == 2


def test_branches_and_decodes_run_in_one_step_with_what_is_cached():
    small = SmallEngine(num_blocks=12)
    small.cache(SIX)
    small.start(beam(1), request(2, EIGHT))
    result = small.step(branches=branches((1, 3, 50), (1, 4, 51)), may=entries((2, 0, 1)))
    assert result.sampled_ids == [2]
    assert sorted(result.candidates) == [3, 4]
    assert small.table(3)[0] == small.table(4)[0] == small.table(2)[0]


def test_a_block_that_somebody_else_refers_to_is_copied_for_every_branch():
    small = SmallEngine(num_blocks=3, is_checked=False)
    small.start(beam(1))
    # A pin, say: nobody writes for it, so nobody is the last owner. One block is left for two.
    small.memory.pool.acquire(np.array([1], dtype=np.int32), Purpose(KvCause.RETAIN))
    plan = branches((1, 2, 50), (1, 3, 51))
    assert small.step(branches=plan).refusal == "MUST_DOES_NOT_FIT"
    assert small.table(1) == [0, 1]
