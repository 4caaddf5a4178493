"""Drafts in the engine: which tokens are kept, and what becomes of the blocks of the others."""

import pytest

from pageframe.core.plan import DraftBounds, Recovery
from pageframe.core.replica import TenantQuota
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from unit.executor.fake_runner import EOS_TOKEN_ID, reference_output
from unit.executor.played_drafter import PlayedDrafter
from unit.executor.small_engine import NUM_TOKENS_MAX, SmallEngine, alone, fork, request
from unit.memory.memories import entries

SIX = list(range(10, 16))
SEVEN = list(range(10, 17))


def bounds(num_tokens: int = 64, each: int = 4, num_blocks: int = 8, **fields) -> DraftBounds:
    return DraftBounds(num_tokens=num_tokens, num_tokens_each=each, num_blocks=num_blocks, **fields)


def drafting(is_right=lambda _: True, **fields) -> SmallEngine:
    return SmallEngine(drafter=PlayedDrafter(is_right), **fields)


def drafted(result) -> list[tuple[int, int, int]]:
    columns = (result.drafted_ids, result.num_drafted, result.num_accepted)
    return list(zip(*columns, strict=True))


def test_all_are_kept_when_all_are_right():
    small = drafting()
    small.start(request(1, SIX))
    result = small.step(drafts=bounds())
    assert result.sampled_ids == [1] * 5
    assert drafted(result) == [(1, 4, 4)]
    assert small.output(1) == alone(SIX, 6)
    assert small.num_computed(1) == 11
    assert small.runner.batches[-1] == [5]


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
def test_those_behind_the_first_wrong_one_are_not(num_right):
    small = drafting(lambda place: place != num_right)
    small.start(request(1, SIX))
    result = small.step(drafts=bounds())
    assert drafted(result) == [(1, 4, num_right)]
    # What was sampled in place of the wrong one is right, as without drafts.
    assert result.sampled_ids == [1] * (num_right + 1)
    assert small.output(1) == alone(SIX, num_right + 2)
    assert small.num_computed(1) == 7 + num_right
    small.step()
    assert small.output(1) == alone(SIX, num_right + 3)


def test_blocks_of_rejected_tokens_come_back_in_the_same_step():
    small = drafting(lambda _: False)
    small.start(request(1, SIX))
    assert small.table(1) == [0, 1]
    small.records()
    result = small.step(drafts=bounds())
    # The newest token is the last of its block; drafts took another, and it is free again.
    assert small.table(1) == [0, 1]
    assert (result.account.free, result.account.held) == (6, 2)
    assert [record for record in small.records() if record[1] == "DRAFT"] == [
        ("ALLOCATE", "DRAFT", (2,), ()),
        ("RELEASE", "DRAFT", (2,), ()),
        ("FREE", "DRAFT", (2,), ()),
    ]


def test_a_block_with_rejected_tokens_is_indexed_only_when_it_is_full_of_others():
    small = drafting(lambda place: place < 1)
    small.start(request(1, SIX))
    # Tokens 6 and 7 are computed and kept; 8 to 10 are computed and are not.
    small.step(drafts=bounds())
    index = small.memory.pool.index
    assert small.num_computed(1) == 8
    assert index.is_indexed[:3].tolist() == [True, True, False]
    # A newcomer finds exactly what an undisturbed sequence would have left behind.
    known = SIX + alone(SIX, 3)
    result = small.start(request(2, [*known, 50]))
    assert result.num_cached_tokens == [8]
    assert small.table(2)[:2] == small.table(1)[:2]
    small.step()
    small.step()
    assert small.output(1) == alone(SIX, 6)


def test_rejected_tokens_are_written_over():
    small = drafting(lambda _: False, num_blocks=16)
    small.start(request(1, SIX))
    for _ in range(12):
        small.step(drafts=bounds())
    assert small.output(1) == alone(SIX, 13)


def test_drafts_need_no_block_that_the_plan_does_not_grant():
    small = drafting()
    small.start(request(1, [*SIX[:5]]))
    # Its newest token is at place 5 of 8: two more fit into the block.
    result = small.step(drafts=bounds(num_blocks=0))
    assert drafted(result) == [(1, 2, 2)]
    assert small.table(1) == [0, 1]


def test_drafts_need_no_block_that_is_not_there():
    small = drafting(num_blocks=2)
    small.start(request(1, SIX[:5]))
    assert drafted(small.step(drafts=bounds())) == [(1, 2, 2)]


def test_drafts_take_no_block_above_a_ceiling():
    small = drafting()
    small.desk.set_quota(TenantQuota(tenant="t", ceiling_blocks=2))
    small.start(request(1, SIX[:5], tenant="t"))
    assert drafted(small.step(drafts=bounds())) == [(1, 2, 2)]


def test_the_bounds_of_a_plan_hold():
    small = drafting()
    small.start(request(1, SIX), request(2, SEVEN), request(3, [30]))
    # The best chances first: those of the first row.
    assert drafted(small.step(drafts=bounds(num_tokens=5, each=3))) == [(1, 3, 3), (2, 2, 2)]
    assert drafted(small.step(drafts=bounds(acceptance_min=0.95))) == []
    # 0.9 squared is 0.81, and its cube 0.73.
    assert drafted(small.step(drafts=bounds(acceptance_min=0.8)))[0] == (1, 2, 2)


def test_no_draft_reaches_beyond_the_last_token():
    small = drafting()
    small.start(request(1, SIX, sampling=SamplingParams(max_tokens=4, ignore_eos=True)))
    # Three tokens are to come; the last of them is sampled and never computed.
    result = small.step(drafts=bounds())
    assert drafted(result) == [(1, 2, 2)]
    assert result.finish_reasons == [0, 0, FinishReason.LENGTH]
    assert small.output(1) == alone(SIX, 4)


def test_a_stop_token_inside_a_draft_ends_the_sequence():
    expected = alone(SIX, 4)
    small = drafting()
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(expected[2],))
    small.start(request(1, SIX, sampling=sampling))
    result = small.step(drafts=bounds())
    assert result.token_ids == expected[1:3]
    assert result.finish_reasons == [0, FinishReason.STOP]
    assert drafted(result) == [(1, 4, 1)]
    assert result.accounts[1].num_draft_tokens == 4
    assert result.accounts[1].num_accepted_tokens == 1
    assert result.account.held == 0


def test_a_stop_token_that_comes_too_early_ends_nothing():
    expected = alone(SIX, 6)
    small = drafting()
    sampling = SamplingParams(
        max_tokens=40, ignore_eos=True, stop_token_ids=(expected[2],), min_tokens=4
    )
    small.start(request(1, SIX, sampling=sampling))
    assert small.step(drafts=bounds()).token_ids == expected[1:6]


def test_others_go_on_beside_it_and_stand_first():
    small = drafting()
    small.start(request(1, SIX), request(2, SEVEN), request(3, [40]))
    result = small.step(
        announce=[request(4, [50, 51])],
        may=entries((4, 0, 2)),
        drafts=bounds(num_tokens=4),
    )
    assert result.sampled_ids == [2, 3, 4, *([1] * 5)]
    assert small.output(4) == alone([50, 51], 1)


def test_who_forks_takes_one_token():
    small = drafting()
    small.start(request(1, SIX), request(2, SEVEN))
    result = small.step(forks=[fork(1, 3)], drafts=bounds())
    assert drafted(result) == [(2, 4, 4)]
    assert result.forked_ids == [3]
    assert small.output(1) == alone(SIX, 2)
    # The child goes on from where its parent was.
    child = alone(SIX + alone(SIX, 1), 1, sample_index=1)
    assert small.output(3) == child


def test_who_is_named_or_steered_takes_one_token():
    small = drafting()
    small.start(request(1, SIX), request(2, SEVEN), request(3, [40], is_steered=True))
    result = small.step(must=entries((1, 0, 5), (3, 0, 1)), drafts=bounds())
    assert drafted(result) == [(2, 4, 4)]
    assert (result.computed_ids, result.num_computed) == ([1, 3], [7, 2])


def test_a_shared_block_is_copied_before_drafts_are_written():
    small = drafting(num_blocks=12)
    small.step(announce=[request(1, SIX)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
    small.runner.sample_indices[small.memory.sequences.get(2).row] = 0
    result = small.step(drafts=bounds())
    assert [row[0] for row in drafted(result)] == [1, 2]
    assert small.table(1)[0] == small.table(2)[0]
    assert small.table(1)[1] != small.table(2)[1]


def test_a_victim_gives_way_as_ever():
    small = drafting()
    small.start(request(1, SIX))
    small.step(drafts=bounds())
    small.preempt(1, Recovery.RECOMPUTE)
    small.resume(1)
    small.step(drafts=bounds())
    assert small.output(1) == alone(SIX, 12)


def test_a_failing_step_leaves_no_block_behind():
    small = drafting()
    small.start(request(1, SIX))
    small.runner.fail_next = True
    result = small.step(drafts=bounds())
    assert result.finish_reasons == [FinishReason.ERROR]
    assert result.drafted_ids == []
    assert result.account.held == 0


def test_an_error_behind_kept_drafts_marks_the_last_token():
    small = drafting(is_checked=False)
    small.start(request(1, SIX))
    small.engine._broken_ids.append(1)
    result = small.step(drafts=bounds())
    assert result.finish_reasons == [0, 0, 0, 0, FinishReason.ERROR]


def test_a_sliding_window_moves_by_what_is_kept():
    small = drafting(lambda place: place < 2, window_tokens=5, num_blocks=12)
    small.start(request(1, SIX))
    for _ in range(4):
        small.step(drafts=bounds())
    # 18 tokens are computed; the newest sees from 14 on, so three blocks are gone.
    assert (small.num_computed(1), small.first_block(1)) == (18, 3)


def test_the_end_of_a_model_is_not_passed():
    small = drafting(num_blocks=40)
    prompt = list(range(NUM_TOKENS_MAX - 3))
    small.start(request(1, prompt, sampling=SamplingParams(max_tokens=99, ignore_eos=True)))
    result = small.step(drafts=bounds())
    assert result.finish_reasons == [0, FinishReason.LENGTH]
    assert small.output(1) == alone(prompt, 3)


def test_a_takeover_resets_the_drafter():
    small = drafting()
    small.start(request(1, SIX))
    small.engine.reset()
    assert small.engine._drafting._drafter.num_resets == 1


def test_an_end_of_sequence_token_inside_a_draft_ends_the_sequence():
    rng_prompt = next(
        prompt
        for prompt in ([first, 7] for first in range(90))
        if reference_output(prompt, 2, SamplingParams(max_tokens=5), 64)[0][-1] == EOS_TOKEN_ID
        and 2 < len(reference_output(prompt, 2, SamplingParams(max_tokens=5), 64)[0]) < 5
    )
    expected, reason = reference_output(rng_prompt, 2, SamplingParams(max_tokens=5), 64)
    small = drafting()
    small.start(request(1, rng_prompt, sampling=SamplingParams(max_tokens=5)))
    result = small.step(drafts=bounds())
    assert small.output(1) == expected
    assert result.finish_reasons[-1] == reason == FinishReason.STOP
