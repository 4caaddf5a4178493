"""Pins never stop who runs, and give way in order: idle sessions, then victims, then handles."""

from pageframe.core.step import RefusedBecause
from pageframe.executor.memory.retaining import SessionTimes, keep_session, pass_time, retain
from unit.memory.memories import Harness, announcement, entries, victims

SALT = b""
TIMES = SessionTimes(idle_ns=1000, ttl_ns=2000)


def harness_with_session(*, num_blocks: int = 4, **options) -> Harness:
    """Blocks 0 and 1 are pinned for a chat between two turns; the others are free."""
    harness = Harness(num_blocks=num_blocks, has_prefix_cache=True, **options)
    harness.run(announce=[announcement(1, 8, session_id="chat")], may=entries((1, 0, 8)))
    sequence = harness.memory.sequences.get(1)
    keep_session(harness.memory, sequence, TIMES, now_ns=0)
    harness.run(finish=[1])
    assert harness.memory.pool.num_pinned == 2
    return harness


def keep_handle(harness: Harness) -> None:
    """Pin blocks 0 and 1 under a handle instead."""
    tokens = [10 + index for index in range(8)]
    retain(
        harness.memory, tenant="", cache_salt=SALT, name="kept", token_ids=tokens, expire_ns=9_000
    )
    pass_time(harness.memory, TIMES.ttl_ns)
    assert [retention.name for retention in harness.memory.retentions] == ["kept"]


def test_an_idle_session_gives_way_to_a_newcomer():
    harness = harness_with_session()
    applied = harness.run(announce=[announcement(2, 12)], may=entries((2, 0, 12)))
    assert applied.result.refused_ids == []
    # The tail of the chat, and no more of it than is needed.
    assert harness.memory.pool.num_pinned == 1
    assert ("UNPIN", "POOL_PRESSURE", (1,)) in harness.sink.brief()


def test_a_session_that_fits_beside_a_newcomer_stays():
    harness = harness_with_session()
    harness.run(announce=[announcement(2, 8)], may=entries((2, 0, 8)))
    assert harness.memory.pool.num_pinned == 2


def test_a_session_gives_way_before_anybody_is_preempted():
    harness = harness_with_session()
    harness.run(announce=[announcement(2, 8)], may=entries((2, 0, 8)))
    applied = harness.run(victims=victims((2, 0)))
    assert applied.result.preempted_ids == []
    assert harness.memory.pool.num_pinned == 1
    assert len(harness.memory.tables.blocks_of(harness.row(2))) == 3


def test_a_handle_stays_while_somebody_else_can_give_way():
    harness = harness_with_session(num_blocks=6)
    keep_handle(harness)
    for sequence_id, num_tokens in ((2, 8), (3, 3)):
        harness.run(
            announce=[announcement(sequence_id, num_tokens)],
            may=entries((sequence_id, 0, num_tokens)),
        )
    assert harness.memory.pool.num_available == 0
    harness.run()
    applied = harness.run(victims=victims((2, 0)))
    assert applied.result.preempted_ids == [2]
    assert harness.memory.pool.num_pinned == 2


def test_a_handle_refuses_newcomers_while_others_run_and_gives_way_when_nobody_does():
    harness = harness_with_session()
    keep_handle(harness)
    harness.run(announce=[announcement(2, 3)], may=entries((2, 0, 3)))
    applied = harness.apply(announce=[announcement(3, 12)], may=entries((3, 0, 12)))
    assert applied.result.refused_because == [RefusedBecause.POOL_FULL]
    applied = harness.run(finish=[2], may=entries((3, 0, 12)))
    assert applied.result.refused_ids == []
    assert harness.memory.pool.num_pinned == 1


def test_a_handle_gives_way_when_what_must_run_would_not_fit_even_alone():
    harness = harness_with_session(num_blocks=3)
    keep_handle(harness)
    harness.run(announce=[announcement(2, 4)], may=entries((2, 0, 4)))
    applied = harness.run()
    assert applied.result.refusal == ""
    assert harness.memory.pool.num_pinned == 1


def test_blocks_that_the_newcomer_shares_itself_are_not_counted_as_giving_way():
    harness = harness_with_session(num_blocks=3)
    tokens = [10 + index for index in range(8)]
    again = announcement(2, 13)
    again.token_ids = [*tokens, 90, 91, 92, 93, 94]
    applied = harness.apply(announce=[again], may=entries((2, 0, 13)))
    assert applied.result.refused_because == [RefusedBecause.POOL_FULL]
    assert harness.memory.pool.num_pinned == 2
