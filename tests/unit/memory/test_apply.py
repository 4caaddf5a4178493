import pytest

from pageframe.core.replica import PoolAccount
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import RefusedBecause
from pageframe.executor.memory.sequence_table import SequenceState
from unit.memory.memories import Harness, announcement, entries, victims


def running(harness: Harness, *sequence_ids: int, num_tokens: int = 4) -> None:
    """Announce, admit and fully compute prompts of ``num_tokens`` tokens in one step."""
    harness.run(
        announce=[announcement(sequence_id, num_tokens) for sequence_id in sequence_ids],
        may=entries(*((sequence_id, 0, num_tokens) for sequence_id in sequence_ids)),
    )
    harness.sink.records.clear()


def test_an_announced_sequence_takes_no_block_before_it_is_admitted():
    harness = Harness()
    applied = harness.apply(announce=[announcement(1), announcement(2)])
    assert applied.result.announced_ids == [1, 2]
    assert applied.result.num_cached_tokens == [0, 0]
    assert harness.memory.pool.account() == PoolAccount(total=8, free=8)
    assert harness.sink.begun == [1, 2]


def test_an_admission_gets_blocks_for_its_chunk_and_not_for_more():
    harness = Harness()
    applied = harness.apply(announce=[announcement(1, 12)], may=entries((1, 0, 5)))
    assert applied.chunks == {harness.row(1): 5}
    assert [sequence.sequence_id for sequence in applied.admitted] == [1]
    assert harness.memory.tables.blocks_of(harness.row(1)).tolist() == [0, 1]


def test_an_entry_takes_no_more_tokens_than_are_left():
    harness = Harness()
    applied = harness.run(announce=[announcement(1, 6)], may=entries((1, 0, 100)))
    assert applied.chunks == {harness.row(1): 6}


def test_caught_up_sequences_decode_without_being_named_in_join_order():
    harness = Harness()
    running(harness, 2, 1)
    applied = harness.apply()
    assert harness.decode_ids(applied) == [2, 1]
    assert applied.named_rows == set()


def test_a_decode_allocates_only_when_it_crosses_into_a_new_block():
    harness = Harness()
    running(harness, 1, num_tokens=3)
    harness.run()
    assert harness.sink.brief() == []
    harness.run()
    (record,) = harness.sink.records
    assert (record.operation.name, record.cause.name) == ("ALLOCATE", "DECODE")
    assert (record.position, record.block_ids, record.step) == (4, (1,), 3)


def test_an_entry_for_a_caught_up_sequence_is_a_decode_that_was_named():
    harness = Harness()
    running(harness, 1, 2)
    applied = harness.apply(must=entries((1, 0, 7)), may=entries((2, 0, 7)))
    assert harness.decode_ids(applied) == [1, 2]
    assert applied.chunks == {}
    assert applied.named_rows == {harness.row(1), harness.row(2)}


def test_a_running_prefill_stands_still_unless_it_is_named():
    harness = Harness()
    harness.run(announce=[announcement(1, 12)], may=entries((1, 0, 4)))
    assert harness.run().chunks == {}
    assert harness.run(must=entries((1, 0, 3))).chunks == {harness.row(1): 3}
    assert harness.memory.sequences.num_computed[harness.row(1)] == 7


def test_must_and_growth_of_one_sequence_add_up_to_one_chunk():
    harness = Harness()
    harness.run(announce=[announcement(1, 12)], may=entries((1, 0, 4)))
    applied = harness.run(must=entries((1, 0, 3)), may=entries((1, 0, 100)))
    assert applied.chunks == {harness.row(1): 8}
    assert harness.memory.tables.num_blocks[harness.row(1)] == 3


def test_finished_blocks_serve_the_same_plan():
    harness = Harness(num_blocks=2)
    running(harness, 1, num_tokens=8)
    applied = harness.apply(finish=[1, 99], announce=[announcement(2, 8)], may=entries((2, 0, 8)))
    assert applied.result.released == [1]
    assert applied.result.accounts[1].num_blocks_peak == 2
    assert applied.result.refused_ids == []
    assert applied.vacated_rows == [0]
    assert harness.sink.ended == [1]
    assert [(operation, cause) for operation, cause, _ in harness.sink.brief()] == [
        ("RELEASE", "FINISHED"),
        ("FREE", "FINISHED"),
        ("ALLOCATE", "PREFILL"),
    ]


def test_victims_are_taken_in_order_and_only_until_the_running_fit():
    harness = Harness(num_blocks=4)
    running(harness, 1, 2, 3, 4)
    applied = harness.apply(victims=victims((3, 0), (4, 0), (1, 0)))
    # Four decodes lack a block each. Without 3 and 4, two are lacking and two are free.
    assert applied.result.preempted_ids == [3, 4]
    assert applied.result.preempted_generations == [1, 1]
    assert applied.result.preempted_num_blocks == [1, 1]
    assert harness.decode_ids(applied) == [1, 2]
    victim = harness.memory.sequences.get(3)
    assert (victim.state, victim.num_preemptions) == (SequenceState.PREEMPTED, 1)
    assert victim.parked_tokens.tolist() == [30, 31, 32, 33, 5]


def test_no_victim_is_taken_when_everything_fits():
    harness = Harness()
    running(harness, 1, 2)
    assert harness.apply(victims=victims((2, 0))).result.preempted_ids == []


def test_a_victim_leaves_the_decodes_and_the_chunks_of_its_step():
    harness = Harness(num_blocks=3)
    harness.run(
        announce=[announcement(1, 4), announcement(2, 8)], may=entries((1, 0, 4), (2, 0, 4))
    )
    applied = harness.apply(must=entries((2, 0, 4)), victims=victims((2, 0)))
    assert harness.decode_ids(applied) == [1]
    assert applied.chunks == {}
    assert applied.named_rows == set()


def test_admissions_never_take_a_victim():
    harness = Harness(num_blocks=2)
    running(harness, 1, num_tokens=7)
    applied = harness.apply(
        announce=[announcement(2)], may=entries((2, 0, 4)), victims=victims((1, 0))
    )
    assert applied.result.preempted_ids == []
    assert applied.result.refused_because == [RefusedBecause.POOL_FULL]


def test_a_preempted_sequence_resumes_under_its_new_generation_with_all_its_tokens():
    harness = Harness(num_blocks=3)
    running(harness, 1, 2)
    harness.run(victims=victims((2, 0)))
    harness.run(finish=[1])
    applied = harness.run(may=entries((2, 1, 100)))
    assert applied.chunks == {harness.row(2): 5}
    assert applied.admitted[0].sequence_id == 2


def test_an_admission_is_whole_or_not_at_all_and_closes_the_door_behind_it():
    harness = Harness(num_blocks=3)
    applied = harness.apply(
        announce=[announcement(1, 8), announcement(2, 8), announcement(3, 4)],
        may=entries((1, 0, 8), (2, 0, 8), (3, 0, 4)),
    )
    assert applied.result.refused_ids == [2, 3]
    assert applied.result.refused_because == [
        RefusedBecause.POOL_FULL,
        RefusedBecause.BEHIND_REFUSED,
    ]
    assert harness.memory.pool.account() == PoolAccount(total=3, free=1, held=2)


def test_without_a_row_an_admission_waits_but_those_behind_may_still_grow():
    harness = Harness(num_rows=1)
    applied = harness.run(
        announce=[announcement(1, 12), announcement(2)],
        may=entries((1, 0, 4), (2, 0, 4), (1, 0, 4)),
    )
    assert applied.result.refused_ids == [2]
    assert applied.result.refused_because == [RefusedBecause.NOT_READY]
    assert applied.chunks == {0: 8}


def test_an_admission_past_the_tokens_of_a_step_is_not_ready():
    harness = Harness(num_blocks=16)
    applied = harness.apply(
        announce=[announcement(1, 30), announcement(2, 4), announcement(3, 2)],
        may=entries((1, 0, 30), (2, 0, 4), (3, 0, 2)),
    )
    assert applied.result.refused_ids == [2]
    assert applied.result.refused_because == [RefusedBecause.NOT_READY]
    assert applied.num_tokens == 32


@pytest.mark.parametrize("num_tokens", [0, -3])
def test_an_admission_without_tokens_is_not_ready(num_tokens):
    harness = Harness()
    applied = harness.apply(announce=[announcement(1)], may=entries((1, 0, num_tokens)))
    assert applied.result.refused_because == [RefusedBecause.NOT_READY]
    assert applied.admitted == []


def test_entries_of_other_generations_and_of_strangers_are_stale():
    harness = Harness()
    running(harness, 1)
    harness.run(announce=[announcement(2)])
    applied = harness.apply(
        must=entries((1, 1, 1), (98, 0, 1), (2, 0, 1)),
        victims=victims((97, 0), (2, 0)),
        may=entries((2, 3, 4), (96, 0, 4)),
    )
    assert applied.result.stale_ids == [1, 98, 2, 97, 2, 2, 96]
    assert harness.decode_ids(applied) == [1]


def test_a_known_sequence_is_announced_anew_only_with_a_newer_generation():
    harness = Harness()
    running(harness, 1)
    applied = harness.run(announce=[announcement(1), announcement(1, generation=1)])
    assert applied.result.stale_ids == [1]
    assert applied.result.announced_ids == [1]
    assert harness.memory.sequences.get(1).state is SequenceState.ANNOUNCED
    assert harness.memory.pool.account() == PoolAccount(total=8, free=8)
    assert applied.vacated_rows == [0]
    assert harness.run(may=entries((1, 1, 4))).chunks == {0: 4}


@pytest.mark.parametrize(
    "bad",
    [
        announcement(1, 0),
        announcement(1, 4, num_prompt_tokens=0),
        announcement(1, 4, num_prompt_tokens=5),
        announcement(1, 64),
        announcement(100, 4),
        announcement(-1, 4),
        announcement(1, 6, num_prompt_tokens=4, sampling=SamplingParams(max_tokens=2)),
    ],
    ids=["empty", "no prompt", "prompt too long", "no room", "over vocabulary", "negative", "done"],
)
def test_what_can_never_run_is_rejected_alone(bad):
    harness = Harness()
    applied = harness.apply(announce=[bad, announcement(2)])
    assert list(applied.rejected) == [bad.sequence_id]
    assert applied.result.announced_ids == [2]


def test_a_plan_is_refused_unless_it_follows_the_last_one():
    harness = Harness()
    running(harness, 1)
    before = harness.snapshot()
    for step in (1, 3):
        assert harness.apply(step=step).result.refusal == "STEP_OUT_OF_ORDER"
    assert harness.snapshot() == before
    assert harness.apply(step=2).result.refusal == ""


def test_plans_built_on_a_refused_plan_are_refused_too():
    harness = Harness()
    running(harness, 1)
    before = harness.snapshot()
    assert harness.apply(builds_on=0).result.refusal == "BUILDS_ON_UNAPPLIED_STEP"
    assert harness.apply(builds_on=2).result.refusal == "BUILDS_ON_UNAPPLIED_STEP"
    assert harness.snapshot() == before
    assert harness.memory.last_applied_step == 1
    assert harness.apply(step=4, builds_on=1).result.refusal == ""


def test_a_plan_whose_running_sequences_cannot_fit_is_refused_and_changes_nothing():
    harness = Harness(num_blocks=3)
    running(harness, 1, 2, 3)
    before = harness.snapshot()
    applied = harness.apply(
        announce=[announcement(4)], finish=[99], victims=victims((2, 0), (2, 0))
    )
    # Two decodes lack a block each, and the one victim gives up only one.
    assert applied.result.refusal == "MUST_DOES_NOT_FIT"
    assert applied.result.announced_ids == []
    assert applied.result.preempted_ids == []
    assert harness.snapshot() == before
    assert harness.apply(victims=victims((2, 0), (1, 0))).result.refusal == ""


def test_a_finish_makes_room_for_the_running_without_a_victim():
    harness = Harness(num_blocks=2)
    running(harness, 1, 2)
    applied = harness.apply(finish=[2], victims=victims((1, 0)))
    assert applied.result.refusal == ""
    assert applied.result.preempted_ids == []
    assert harness.decode_ids(applied) == [1]


def test_more_running_tokens_than_a_step_takes_are_refused():
    harness = Harness(num_blocks=16)
    harness.run(announce=[announcement(1, 60)], may=entries((1, 0, 4)))
    before = harness.snapshot()
    assert harness.apply(must=entries((1, 0, 33))).result.refusal == "STEP_TOKENS_EXCEEDED"
    assert harness.snapshot() == before


def test_blocks_that_a_step_in_flight_may_touch_do_not_serve_an_admission():
    harness = Harness(num_blocks=2)
    running(harness, 1, num_tokens=7)
    harness.memory.pool.launch(2)
    applied = harness.apply(finish=[1], announce=[announcement(2)], may=entries((2, 0, 4)))
    assert applied.result.refused_because == [RefusedBecause.POOL_FULL]
    assert harness.memory.pool.account() == PoolAccount(total=2, fenced=2)
    harness.memory.pool.complete(2)
    assert harness.memory.pool.account() == PoolAccount(total=2, free=2)
    assert harness.apply(may=entries((2, 0, 4))).result.refused_ids == []


def test_victims_under_a_step_in_flight_do_not_make_room_yet():
    harness = Harness(num_blocks=2)
    running(harness, 1, 2)
    harness.memory.pool.launch(2)
    chosen = victims((2, 0), (1, 0))
    # Taking both leaves nothing that must run, so the plan fits without any free block.
    applied = harness.apply(victims=chosen)
    assert applied.result.preempted_ids == [2, 1]
    assert harness.memory.pool.account() == PoolAccount(total=2, fenced=2)


def test_reset_releases_everything_and_counts_steps_anew():
    harness = Harness()
    running(harness, 1, 2)
    harness.run(announce=[announcement(3)])
    harness.sink.records.clear()
    harness.memory.reset()
    assert harness.memory.pool.account() == PoolAccount(total=8, free=8)
    assert len(harness.memory.sequences) == 0
    assert {record.cause.name for record in harness.sink.records} == {"TAKEOVER"}
    assert harness.sink.ended == [1, 2, 3]
    assert harness.run(step=1, builds_on=0, announce=[announcement(1)]).result.refusal == ""
