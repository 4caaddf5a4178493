"""Forks, and the copies that follow when somebody writes."""

import pytest

from pageframe.core.plan import Recovery, Victims
from pageframe.core.replica import PoolAccount
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from unit.executor.small_engine import LONG, SmallEngine, alone, fork, request
from unit.memory.memories import entries

TEN = range(10, 20)
EIGHT = range(10, 18)


def test_children_share_every_block_of_the_parent_the_partly_filled_one_too():
    small = SmallEngine()
    small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2, 3)])
    assert small.table(1) == small.table(2) == small.table(3) == [0, 1, 2]
    assert small.memory.pool.columns.ref_counts[:3].tolist() == [3, 3, 3]
    assert small.engine.account() == PoolAccount(total=8, free=5, held=3)
    assert small.sink.brief() == [
        ("ALLOCATE", "PREFILL", (0, 1, 2)),
        ("SHARE", "FORK", (0, 1, 2)),
        ("SHARE", "FORK", (0, 1, 2)),
        ("INDEX", "SEALED", (0, 1)),
    ]


def test_the_first_writers_copy_and_the_last_owner_writes_in_place():
    small = SmallEngine()
    small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2, 3)])
    small.sink.records.clear()
    small.step()
    assert [small.table(it) for it in (1, 2, 3)] == [[0, 1, 3], [0, 1, 4], [0, 1, 2]]
    copies = [it for it in small.records() if it[0] == "COPY_ON_WRITE"]
    assert copies == [
        ("COPY_ON_WRITE", "DECODE", (2,), (3,)),
        ("COPY_ON_WRITE", "DECODE", (2,), (4,)),
    ]
    assert small.memory.pool.columns.ref_counts[:5].tolist() == [3, 3, 1, 1, 1]


def test_nobody_copies_a_second_time():
    small = SmallEngine()
    small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
    small.step()
    small.sink.records.clear()
    small.step()
    assert small.sink.brief() == [("INDEX", "SEALED", (3,)), ("INDEX", "SEALED", (2,))]


def test_a_fork_at_the_end_of_a_block_copies_nothing():
    small = SmallEngine()
    small.step(announce=[request(1, EIGHT)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
    assert small.table(2) == [0, 1]
    small.sink.records.clear()
    small.step()
    assert [small.table(1), small.table(2)] == [[0, 1, 2], [0, 1, 3]]
    assert small.sink.brief() == [("ALLOCATE", "DECODE", (2,)), ("ALLOCATE", "DECODE", (3,))]


def test_each_child_takes_its_own_first_token_from_the_row_of_the_parent():
    """Children of one request with one seed that all get the same tokens: a bug of its own."""
    small = SmallEngine(num_blocks=16)
    small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2, 3)])
    for _ in range(6):
        small.step()
    outputs = [small.output(sequence_id) for sequence_id in (1, 2, 3)]
    assert outputs == [alone(TEN, 7, sample_index) for sample_index in (0, 1, 2)]
    assert len({tuple(output) for output in outputs}) == 3


def test_a_fork_of_a_fork_shares_on():
    small = SmallEngine()
    small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
    small.step(forks=[fork(2, 3)])
    assert [small.table(it) for it in (1, 2, 3)] == [[0, 1, 3], [0, 1, 2], [0, 1, 2]]
    small.step()
    assert [small.table(it) for it in (1, 2, 3)] == [[0, 1, 3], [0, 1, 4], [0, 1, 2]]


def test_without_the_others_the_remaining_owner_writes_in_place():
    small = SmallEngine()
    small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
    small.sink.records.clear()
    small.step(finish=[1])
    assert small.table(2) == [0, 1, 2]
    assert small.sink.brief() == [("RELEASE", "FINISHED", (0, 1, 2))]


def test_without_a_prefix_cache_forks_share_and_copy_all_the_same():
    small = SmallEngine(has_prefix_cache=False)
    small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
    small.step()
    assert [small.table(1), small.table(2)] == [[0, 1, 3], [0, 1, 2]]
    small.engine.cancel([1, 2])
    assert small.engine.account() == PoolAccount(total=8, free=8)


def test_what_sharing_came_to_is_in_the_account_of_each_sequence():
    small = SmallEngine()
    small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
    small.step()
    accounts = small.engine.cancel([1, 2]).accounts
    parent, child = accounts[1], accounts[2]
    assert (parent.num_blocks_shared, parent.num_copies_on_write) == (0, 1)
    assert (child.num_blocks_shared, child.num_copies_on_write) == (3, 0)
    assert child.num_blocks_saved == 3
    assert parent.num_blocks_peak == child.num_blocks_peak == 3


def test_a_child_for_which_there_is_no_row_is_refused_and_not_known():
    small = SmallEngine(num_rows=2)
    result = small.step(
        announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2, 3, 4)]
    )
    assert (result.forked_ids, result.unforked_ids) == ([2], [3, 4])
    assert small.memory.sequences.get(3) is None
    assert result.sampled_ids == [1, 2]


def test_a_parent_that_takes_no_token_in_the_step_has_no_children():
    small = SmallEngine()
    result = small.step(announce=[request(1, TEN)], may=entries((1, 0, 6)), forks=[fork(1, 2)])
    assert (result.forked_ids, result.unforked_ids) == ([], [2])
    result = small.step(must=entries((1, 0, 3)), forks=[fork(1, 2)])
    assert result.unforked_ids == [2]
    result = small.step(must=entries((1, 0, 1)), forks=[fork(1, 2)])
    assert (result.forked_ids, result.unforked_ids) == ([2], [])


@pytest.mark.parametrize("parent_id", [1, 99])
def test_parents_that_wait_or_are_unknown_have_no_children(parent_id):
    small = SmallEngine()
    result = small.step(announce=[request(1, TEN)], forks=[fork(parent_id, 2)])
    assert (result.forked_ids, result.unforked_ids) == ([], [2])


def test_a_parent_of_another_generation_has_no_children():
    small = SmallEngine()
    small.start(request(1, TEN))
    assert small.step(forks=[fork(1, 2, generation=1)]).unforked_ids == [2]


def test_a_parent_that_ends_in_the_same_plan_has_no_children():
    small = SmallEngine()
    small.start(request(1, TEN))
    result = small.step(finish=[1], forks=[fork(1, 2)])
    assert (result.released, result.unforked_ids) == ([1], [2])
    assert small.engine.is_idle


def test_a_parent_that_gives_way_in_the_same_plan_has_no_children():
    small = SmallEngine(num_blocks=4)
    small.start(request(1, EIGHT), request(2, range(30, 38)))
    chosen = Victims()
    chosen.add(2, 0, Recovery.RECOMPUTE)
    result = small.step(victims=chosen, forks=[fork(2, 3)])
    assert (result.preempted_ids, result.unforked_ids) == ([2], [3])


def test_a_child_that_is_known_already_is_refused_and_left_alone():
    small = SmallEngine()
    small.start(request(1, TEN), request(2, range(30, 33)))
    result = small.step(forks=[fork(1, 2, 3, 3)])
    assert (result.forked_ids, result.unforked_ids) == ([3], [2, 3])
    assert small.tokens(2)[:3] == [30, 31, 32]


def test_a_parent_that_gets_its_last_token_still_forks():
    small = SmallEngine()
    two = SamplingParams(max_tokens=2, ignore_eos=True)
    small.start(request(1, TEN, sampling=two))
    result = small.step(forks=[fork(1, 2)])
    assert result.sampled_ids == [1, 2]
    assert result.finish_reasons == [FinishReason.LENGTH] * 2
    assert result.token_ids[1] == alone([*TEN, small.output(1)[0]], 1, 1)[0]
    assert small.engine.is_idle


def test_copies_are_counted_in_what_must_fit():
    small = SmallEngine(num_blocks=3)
    small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
    before = small.memory.pool.columns.ref_counts.tolist()
    # Two writers of one block need one copy, and no block is free.
    assert small.step().refusal == "MUST_DOES_NOT_FIT"
    assert small.memory.pool.columns.ref_counts.tolist() == before


def test_a_child_that_gives_way_makes_its_parent_the_last_owner_who_needs_no_copy():
    small = SmallEngine(num_blocks=3)
    small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
    chosen = Victims()
    chosen.add(2, 0, Recovery.RECOMPUTE)
    small.sink.records.clear()
    result = small.step(victims=chosen)
    assert (result.refusal, result.preempted_ids) == ("", [2])
    assert small.table(1) == [0, 1, 2]
    assert small.sink.brief() == [("RELEASE", "PREEMPTED", (0, 1, 2))]


def test_a_copy_is_charged_to_who_writes_and_the_original_stays_with_who_allocated_it():
    small = SmallEngine()
    small.step(
        announce=[request(1, TEN, tenant="alice")], may=entries((1, 0, 64)), forks=[fork(1, 2)]
    )
    small.cache(range(40, 44), tenant="bob")
    small.start(request(3, range(40, 44), tenant="carol"))
    held = {name: count for name, count in small.memory.num_held_by_tenant().items() if count}
    # Sequence 3 found bob's block, and copies it to write its last token anew.
    assert held == {"alice": 4, "carol": 1}


def test_log_probabilities_of_a_prompt_are_asked_for_once_by_the_parent():
    small = SmallEngine()
    asked = []
    admit = small.runner.admit

    def note(row, *, sampling, **facts):
        asked.append(sampling.num_prompt_logprobs)
        admit(row, sampling=sampling, **facts)

    small.runner.admit = note
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, num_prompt_logprobs=2)
    small.step(
        announce=[request(1, TEN, sampling=sampling)], may=entries((1, 0, 64)), forks=[fork(1, 2)]
    )
    assert asked == [2, -1]
    assert small.memory.sequences.get(2).sampling == sampling
    assert LONG.num_prompt_logprobs == -1


def test_a_child_of_a_parent_that_cannot_be_set_up_ends_with_it():
    small = SmallEngine()
    small.runner.fail_admit_of.add(7)
    result = small.step(
        announce=[request(1, TEN, sample_index=7)], may=entries((1, 0, 64)), forks=[fork(1, 2)]
    )
    reasons = dict(zip(result.sampled_ids, result.finish_reasons, strict=True))
    assert reasons[1] == FinishReason.ERROR
    # The child has no row in the runner: it must not be told to run, nor stay behind.
    assert small.memory.sequences.get(2) is None
    assert result.forked_ids == [] or reasons.get(2) == FinishReason.ERROR
    assert small.engine.is_idle
    assert small.engine.account().held == 0
