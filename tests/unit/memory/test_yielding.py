"""Pins never stop who runs, and give way in order: idle sessions, then victims, then handles."""

from pageframe.core.replica import TenantQuota
from pageframe.core.step import RefusedBecause
from pageframe.executor.memory.retaining import SessionTimes, keep_session, pass_time, retain
from pageframe.executor.memory.yielding import num_yieldable
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


def test_a_session_counts_for_a_newcomer_though_floors_of_others_keep_what_is_available():
    harness = harness_with_session()
    floor = TenantQuota(tenant="ants", floor_blocks=2)
    harness.memory.quotas.replace([floor], num_blocks_total=4)
    applied = harness.run(announce=[announcement(2, 8)], may=entries((2, 0, 8)))
    assert applied.result.refused_ids == []


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


def harness_with_a_chat_charged_to_another(*, ceiling_blocks: int) -> Harness:
    """Blocks 0 and 1: bob's chat keeps them, carol was the first to hold them, and is charged."""
    harness = Harness(num_blocks=8, has_prefix_cache=True)
    tokens = [10 + index for index in range(8)]
    mine = announcement(1, 8, tenant="carol")
    harness.run(announce=[mine], may=entries((1, 0, 8)))
    his = announcement(2, 8, tenant="bob", session_id="chat")
    his.token_ids = [*tokens]
    harness.run(announce=[his], may=entries((2, 0, 8)))
    keep_session(harness.memory, harness.memory.sequences.get(2), TIMES, now_ns=0)
    harness.run(finish=[1, 2])
    assert harness.memory.num_held_by_tenant()["carol"] == 2
    harness.memory.quotas.set(TenantQuota(tenant="carol", ceiling_blocks=ceiling_blocks), 8)
    return harness


def test_a_chat_of_another_gives_way_for_the_ceiling_of_who_is_charged():
    harness = harness_with_a_chat_charged_to_another(ceiling_blocks=3)
    harness.run(announce=[announcement(3, 4, tenant="carol")], may=entries((3, 0, 4)))
    assert harness.memory.num_held_by_tenant()["carol"] == 3
    applied = harness.run()
    assert applied.result.refusal == ""
    assert harness.memory.num_held_by_tenant()["carol"] == 3
    assert harness.memory.pool.num_pinned == 1


def test_a_ceiling_takes_no_more_of_a_chat_than_it_needs():
    harness = harness_with_a_chat_charged_to_another(ceiling_blocks=4)
    applied = harness.run(announce=[announcement(3, 12, tenant="carol")], may=entries((3, 0, 12)))
    assert applied.result.refused_because == []
    assert harness.memory.pool.num_pinned == 1


def keep_one_block(harness: Harness, sequence_id: int, tenant: str) -> None:
    """A chat of ``tenant`` keeps a block; nobody runs."""
    first = announcement(sequence_id, 4, tenant=tenant, session_id="chat")
    harness.run(announce=[first], may=entries((sequence_id, 0, 4)))
    sequence = harness.memory.sequences.get(sequence_id)
    keep_session(harness.memory, sequence, TIMES, now_ns=0)
    harness.run(finish=[sequence_id])


def test_a_chat_that_gave_way_for_a_ceiling_is_not_counted_on_again():
    harness = Harness(num_blocks=3, has_prefix_cache=True)
    for sequence_id, tenant in ((1, "bob"), (2, "carol")):
        keep_one_block(harness, sequence_id, tenant)
    harness.memory.quotas.set(TenantQuota(tenant="alice", floor_blocks=1), 3)
    harness.memory.quotas.set(TenantQuota(tenant="bob", ceiling_blocks=3), 3)
    applied = harness.apply(announce=[announcement(3, 12, tenant="bob")], may=entries((3, 0, 12)))
    assert applied.result.refused_because == [RefusedBecause.POOL_FULL]


def test_what_a_tenant_lacks_of_its_floor_is_not_made_up_from_its_own_chats():
    harness = Harness(num_blocks=4, has_prefix_cache=True)
    keep_one_block(harness, 1, "carol")
    harness.memory.quotas.set(TenantQuota(tenant="carol", floor_blocks=2), 4)
    carol = harness.memory.pool.tenants.id_of("carol")
    num_for_carol = [num_yieldable(harness.memory, {carol: needed}) for needed in (0, 1, 2)]
    # The first block that it needs is kept for it anyway: giving its own up would help nobody.
    assert num_for_carol == [0, 0, 1]


def test_a_floor_is_not_given_away_twice_to_a_victim_and_to_a_chat():
    harness = Harness(num_blocks=4, has_prefix_cache=True)
    keep_one_block(harness, 1, "bob")
    for sequence_id, tenant, num_tokens in ((2, "bob", 1), (3, "bob", 1), (4, "carol", 9)):
        harness.run(
            announce=[announcement(sequence_id, num_tokens, tenant=tenant)],
            may=entries((sequence_id, 0, 1)),
        )
    harness.memory.quotas.set(TenantQuota(tenant="bob", floor_blocks=2), 4)
    # Either a victim or the chat could go, and carol needs two blocks.
    applied = harness.apply(must=entries((4, 0, 8)), victims=victims((2, 0)))
    assert applied.result.refusal == "MUST_DOES_NOT_FIT"
    applied = harness.apply(must=entries((4, 0, 3)), victims=victims((2, 0)))
    assert applied.result.refusal == ""


def test_what_a_chat_shares_with_somebody_running_does_not_give_way_in_vain():
    harness = harness_with_session(num_blocks=3)
    again = announcement(2, 9)
    again.token_ids = [*range(10, 18), 99]
    harness.run(announce=[again], may=entries((2, 0, 9)))
    assert harness.memory.account().yieldable == 0
    applied = harness.apply(announce=[announcement(3, 4)], may=entries((3, 0, 4)))
    assert applied.result.refused_because == [RefusedBecause.POOL_FULL]
    assert harness.memory.pool.num_pinned == 2


class TestYieldable:
    def test_blocks_that_only_a_chat_holds_are_told(self):
        harness = harness_with_session()
        assert harness.memory.account().yieldable == 2

    def test_blocks_under_a_handle_too_are_not(self):
        harness = harness_with_session()
        tokens = [10 + index for index in range(4)]
        retain(
            harness.memory, tenant="", cache_salt=SALT, name="kept", token_ids=tokens, expire_ns=9
        )
        assert harness.memory.account().yieldable == 1

    def test_two_chats_on_one_block_are_one_block(self):
        harness = harness_with_session()
        again = announcement(2, 4, session_id="other chat")
        again.token_ids = [10, 11, 12, 13]
        harness.run(announce=[again], may=entries((2, 0, 4)))
        sequence = harness.memory.sequences.get(2)
        keep_session(harness.memory, sequence, TIMES, now_ns=0)
        harness.run(finish=[2])
        assert harness.memory.pool.columns.idle_pin_counts[:2].tolist() == [2, 1]
        assert harness.memory.account().yieldable == 2

    def test_blocks_below_the_floor_of_their_tenant_are_not_for_everybody(self):
        harness = harness_with_a_chat_charged_to_another(ceiling_blocks=8)
        quota = TenantQuota(tenant="carol", floor_blocks=1, ceiling_blocks=8)
        harness.memory.quotas.set(quota, 8)
        assert harness.memory.account().yieldable == 1

    def test_blocks_that_gave_way_are_cached_instead(self):
        harness = harness_with_session()
        harness.run(announce=[announcement(2, 12)], may=entries((2, 0, 12)))
        assert harness.memory.account().yieldable == 1
        pass_time(harness.memory, TIMES.ttl_ns)
        assert harness.memory.account().yieldable == 0
