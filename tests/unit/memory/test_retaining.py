"""Prefixes kept by name: what is pinned, for how long, and what a quota has to say to it."""

import pytest

from pageframe.core.errors import NotFoundError, OutOfRangeError, ResourceExhaustedError
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.core.step import FinishReason, RefusedBecause
from pageframe.core.trace import KvCause
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.retaining import SessionTimes
from pageframe.executor.memory.retention import RetentionKind
from unit.executor.small_engine import LONG, ONE_TOKEN, SmallEngine, alone, request
from unit.memory.memories import entries

EIGHT = list(range(10, 18))
TEN = list(range(10, 20))
TTL_NS = 1_000
IDLE = SessionTimes(idle_ns=100, ttl_ns=500)


def retain(small: SmallEngine, token_ids, name: str = "h", tenant: str = "t", **changes):
    facts = {"cache_salt": b"", "ttl_ns": TTL_NS, "now_ns": small.clock.now_ns()} | changes
    return small.desk.retain(tenant=tenant, name=name, token_ids=list(token_ids), **facts)


def pass_time(small: SmallEngine, delta_ns: int) -> bool:
    small.clock.advance_ns(delta_ns)
    has_changed = small.desk.pass_time()
    small.check()
    return has_changed


class TestHandles:
    def test_cached_blocks_are_pinned_and_held_by_who_keeps_them(self):
        small = SmallEngine()
        small.cache(TEN)
        facts = retain(small, TEN)
        assert (facts.num_tokens, facts.expire_ns) == (8, small.clock.now_ns() + TTL_NS)
        assert small.engine.account() == PoolAccount(total=8, free=6, held=2, pinned=2)
        assert {record.cause.name for record in small.sink.records} == {"RETAIN"}
        assert [it for name, _, ids in small.sink.brief() for it in ids if name == "PIN"] == [0, 1]
        assert small.memory.num_held_by_tenant()["t"] == 2

    def test_only_full_blocks_are_kept(self):
        small = SmallEngine()
        small.cache(TEN)
        assert retain(small, TEN[:7]).num_tokens == 4
        assert retain(small, TEN[:3], name="short").num_tokens == 0

    def test_pinned_blocks_are_not_evicted(self):
        small = SmallEngine(num_blocks=4)
        small.start(request(1, TEN))
        retain(small, TEN)
        small.engine.cancel([1])
        small.start(request(2, range(40, 48)))
        assert small.engine.account().pinned == 2
        assert small.start(request(3, TEN)).num_cached_tokens == [8]

    def test_what_is_not_there_yet_is_pinned_when_it_is_computed(self):
        small = SmallEngine()
        assert retain(small, TEN).num_tokens == 0
        small.step(announce=[request(1, TEN)], may=entries((1, 0, 5)))
        assert small.engine.account().pinned == 1
        small.step(must=entries((1, 0, 5)))
        assert small.engine.account().pinned == 2
        small.engine.cancel([1])
        assert small.engine.account() == PoolAccount(total=8, free=6, held=2, pinned=2)

    def test_what_is_in_the_host_tier_is_pinned_when_it_is_promoted(self):
        small = SmallEngine(num_blocks=4, num_host_slots=8)
        small.cache(EIGHT, range(40, 56))
        assert retain(small, EIGHT).num_tokens == 0
        small.start(request(1, TEN, sampling=ONE_TOKEN))
        assert small.memory.pool.index.is_indexed.sum() == 4
        assert small.engine.account().pinned == 2

    def test_what_another_tenant_computes_under_the_same_salt_is_pinned_too(self):
        small = SmallEngine()
        retain(small, EIGHT, tenant="alice")
        small.start(request(1, TEN, tenant="bob"))
        small.engine.cancel([1])
        held = {name: count for name, count in small.memory.num_held_by_tenant().items() if count}
        # Charged to who allocated them, as long as they are held without a break.
        assert held == {"bob": 2}

    def test_another_salt_is_another_content(self):
        small = SmallEngine()
        small.cache(TEN, cache_salt=b"a")
        assert retain(small, TEN, cache_salt=b"b").num_tokens == 0

    def test_released_blocks_are_cached_again_tail_before_head(self):
        small = SmallEngine()
        small.cache(TEN)
        retain(small, TEN)
        small.sink.records.clear()
        small.desk.release(tenant="t", name="h")
        assert small.cached_ids() == [1, 0]
        assert small.sink.brief() == [("UNPIN", "RETAIN", (0, 1))]
        with pytest.raises(NotFoundError, match="HANDLE_UNKNOWN"):
            small.desk.release(tenant="t", name="h")

    def test_two_handles_pin_twice_and_each_gives_back_its_own(self):
        small = SmallEngine()
        small.cache(TEN)
        retain(small, TEN, name="a")
        retain(small, TEN[:4], name="b")
        assert small.memory.pool.columns.pin_counts[:2].tolist() == [2, 1]
        small.desk.release(tenant="t", name="a")
        assert small.memory.pool.columns.pin_counts[:2].tolist() == [1, 0]
        assert small.engine.account() == PoolAccount(total=8, free=6, held=1, cached=1, pinned=1)

    def test_a_handle_of_another_tenant_looks_like_none(self):
        small = SmallEngine()
        small.cache(TEN)
        retain(small, TEN)
        with pytest.raises(NotFoundError, match="HANDLE_UNKNOWN"):
            small.desk.release(tenant="other", name="h")
        assert small.engine.account().pinned == 2

    def test_a_renewal_gives_back_what_it_names_no_more(self):
        small = SmallEngine()
        small.cache(TEN, range(40, 45))
        retain(small, TEN)
        small.sink.records.clear()
        facts = retain(small, range(40, 44))
        assert facts.num_tokens == 4
        assert [it for it in small.sink.brief() if it[0] != "PIN"] == [("UNPIN", "EXPIRED", (0, 1))]
        assert small.engine.account().pinned == 1

    def test_a_renewal_moves_the_end(self):
        small = SmallEngine()
        small.cache(TEN)
        retain(small, TEN)
        small.clock.advance_ns(TTL_NS - 1)
        retain(small, TEN)
        assert not pass_time(small, 1)
        assert small.engine.account().pinned == 2
        assert pass_time(small, TTL_NS - 1)
        assert small.engine.account().pinned == 0

    def test_it_ends_when_its_time_has_come(self):
        small = SmallEngine()
        small.cache(TEN)
        retain(small, TEN)
        assert small.desk.next_due_ns == small.clock.now_ns() + TTL_NS
        assert not pass_time(small, TTL_NS - 1)
        small.sink.records.clear()
        assert pass_time(small, 1)
        assert small.sink.brief() == [("UNPIN", "EXPIRED", (0, 1))]
        assert (len(small.memory.retentions), small.desk.next_due_ns) == (0, 0)

    def test_what_gave_way_to_a_newcomer_is_pinned_again_when_it_comes_back(self):
        small = SmallEngine(num_blocks=3, num_host_slots=4)
        small.cache(EIGHT)
        retain(small, EIGHT)
        small.start(request(1, range(40, 51)))
        assert (small.engine.account().pinned, small.memory.host.num_held) == (0, 2)
        small.engine.cancel([1])
        small.start(request(2, [*EIGHT, 18]))
        assert small.engine.account().pinned == 2

    def test_a_takeover_leaves_it_alone(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        retain(small, TEN)
        small.engine.reset()
        assert small.engine.account() == PoolAccount(total=8, free=6, held=2, pinned=2)
        assert small.start(request(1, TEN)).num_cached_tokens == [8]


class TestRequestsWithAHandle:
    def test_a_prompt_that_begins_with_the_prefix_is_taken(self):
        small = SmallEngine()
        retain(small, EIGHT)
        result = small.start(request(1, TEN, tenant="t", prefix_handle="h"))
        assert result.announced_ids == [1]

    @pytest.mark.parametrize("prompt", [[*EIGHT[:7], 60, 61], EIGHT[:7]], ids=["other", "short"])
    def test_a_prompt_that_does_not_is_refused_with_the_reason(self, prompt):
        small = SmallEngine()
        retain(small, EIGHT)
        result = small.start(request(1, prompt, tenant="t", prefix_handle="h"))
        assert (result.sampled_ids, result.finish_reasons) == ([1], [FinishReason.ERROR])
        assert result.errors == {1: "PREFIX_MISMATCH"}
        assert small.engine.is_idle

    @pytest.mark.parametrize(("tenant", "name"), [("other", "h"), ("t", "i")])
    def test_a_handle_that_is_not_the_tenants_own_is_unknown(self, tenant, name):
        small = SmallEngine()
        retain(small, EIGHT)
        result = small.start(request(1, TEN, tenant=tenant, prefix_handle=name))
        assert result.errors == {1: "HANDLE_UNKNOWN"}

    def test_a_prompt_under_another_salt_does_not_begin_with_it(self):
        small = SmallEngine()
        retain(small, EIGHT)
        result = small.start(request(1, TEN, tenant="t", prefix_handle="h", cache_salt=b"x"))
        assert result.errors == {1: "PREFIX_MISMATCH"}

    def test_one_refused_request_does_not_stop_the_others(self):
        small = SmallEngine()
        result = small.start(request(1, TEN, prefix_handle="h"), request(2, TEN))
        assert result.errors == {1: "HANDLE_UNKNOWN"}
        assert sorted(result.sampled_ids) == [1, 2]


class TestQuota:
    def test_no_more_is_pinned_than_the_ceiling_allows_from_the_head_on(self):
        small = SmallEngine()
        small.cache(range(10, 23))
        small.desk.set_quota(TenantQuota(tenant="t", ceiling_blocks=2))
        assert retain(small, range(10, 22)).num_tokens == 8
        assert small.memory.pool.columns.pin_counts[:3].tolist() == [1, 1, 0]

    def test_a_quota_without_room_for_a_single_block_is_an_error(self):
        small = SmallEngine()
        small.cache(TEN)
        small.desk.set_quota(TenantQuota(tenant="t", ceiling_blocks=0))
        with pytest.raises(ResourceExhaustedError) as caught:
            retain(small, TEN)
        assert caught.value.reason == "QUOTA_EXCEEDED"
        assert caught.value.limits["ceiling_blocks"] == "0"
        assert len(small.memory.retentions) == 0

    def test_the_floor_of_another_bounds_pins_as_well(self):
        small = SmallEngine(num_blocks=4)
        small.cache(range(10, 23))
        small.desk.set_quota(TenantQuota(tenant="other", floor_blocks=2))
        assert retain(small, range(10, 22)).num_tokens == 8

    def test_pins_of_a_tenant_that_needs_them_for_its_floor_do_not_give_way(self):
        """A floor is what others cannot take, whether it is filled by sequences or by pins."""
        for options in ({}, {"num_host_slots": 4}):
            small = SmallEngine(num_blocks=3, session_times=IDLE, **options)
            small.cache(EIGHT, tenant="t", session_id="chat")
            small.desk.set_quota(TenantQuota(tenant="t", floor_blocks=2))
            result = small.start(request(1, range(40, 49), tenant="other"))
            assert result.refused_because == [RefusedBecause.POOL_FULL]
            assert small.engine.account().pinned == 2
            # Its own sequences may have them.
            small.engine.cancel([1])
            assert small.start(request(2, range(40, 49), tenant="t")).refused_ids == []

    def test_sessions_give_way_under_its_own_ceiling_too(self):
        """What a tenant keeps must not keep the tenant itself out."""
        small = SmallEngine(session_times=IDLE)
        small.desk.set_quota(TenantQuota(tenant="t", ceiling_blocks=2))
        small.cache(EIGHT, tenant="t", session_id="chat")
        assert small.engine.account().pinned == 2
        result = small.start(request(1, [40, 41, 42, 43], tenant="t"))
        assert result.refused_ids == []
        # And again when what it runs grows.
        assert small.step().sampled_ids == [1]

    def test_what_was_found_in_the_host_tier_may_be_dropped_while_they_give_way(self):
        """What gives way goes to a tier that is full, and pushes out what was to come from it."""
        small = SmallEngine(num_host_slots=1, session_times=IDLE)
        small.cache(range(40, 45))
        small.memory.pool.evict(1, Purpose(KvCause.POOL_PRESSURE))
        small.step()
        small.cache(EIGHT, tenant="t", session_id="chat")
        small.desk.set_quota(TenantQuota(tenant="t", ceiling_blocks=2))
        small.start(request(1, range(40, 45), tenant="t"))
        while small.memory.sequences.get(1).row < 0:
            assert small.resume(1).refused_because in (
                [],
                [RefusedBecause.NOT_READY],
                [RefusedBecause.PROMOTING],
            )
        assert small.output(1) == alone(range(40, 45), 1)

    def test_growth_takes_no_pin_of_a_floor_either(self):
        small = SmallEngine(num_blocks=4, session_times=IDLE)
        small.cache(EIGHT, tenant="t", session_id="chat")
        small.desk.set_quota(TenantQuota(tenant="t", floor_blocks=2))
        small.start(request(1, range(40, 48), tenant="other"))
        assert small.step().refusal == "MUST_DOES_NOT_FIT"
        assert small.engine.account().pinned == 2

    def test_blocks_that_somebody_holds_cost_nothing_to_pin(self):
        small = SmallEngine()
        small.start(request(1, TEN, tenant="a"))
        small.desk.set_quota(TenantQuota(tenant="t", ceiling_blocks=0))
        assert retain(small, TEN).num_tokens == 8

    def test_nobody_keeps_one_for_longer_than_the_operator_allows(self):
        small = SmallEngine(handle_ttl_max_ns=TTL_NS - 1)
        with pytest.raises(OutOfRangeError, match="HANDLE_TTL_ABOVE_MAX"):
            retain(small, TEN)
        retain(small, TEN, ttl_ns=TTL_NS - 1)


class TestSessions:
    def turn(self, small: SmallEngine, sequence_id: int, prompt, **changes) -> list[int]:
        """One turn of a chat of a single token; returns what it found."""
        facts = {"session_id": "chat", "tenant": "t", "sampling": ONE_TOKEN} | changes
        result = small.start(request(sequence_id, prompt, **facts))
        return result.num_cached_tokens

    def test_the_blocks_of_a_turn_are_pinned_when_it_ends(self):
        small = SmallEngine(session_times=IDLE)
        self.turn(small, 1, TEN)
        assert small.engine.account() == PoolAccount(total=8, free=6, held=2, pinned=2, yieldable=2)
        assert [it for it in small.sink.brief() if it[0] == "PIN"] == [
            ("PIN", "SESSION", (0, 1)),
        ]

    def test_the_next_turn_finds_them_and_pins_its_own(self):
        small = SmallEngine(session_times=IDLE)
        self.turn(small, 1, TEN)
        assert self.turn(small, 2, [*TEN, 30, 31, 32]) == [8]
        assert small.engine.account().pinned == 3
        (session,) = small.memory.retentions
        assert (session.kind, len(session.keys)) == (RetentionKind.SESSION, 3)

    def test_a_turn_that_begins_otherwise_replaces_the_last(self):
        small = SmallEngine(session_times=IDLE)
        self.turn(small, 1, TEN)
        self.turn(small, 2, range(40, 45))
        assert small.engine.account() == PoolAccount(
            total=8, free=5, held=1, cached=2, pinned=1, yieldable=1
        )

    def test_sessions_of_two_tenants_are_two(self):
        small = SmallEngine(session_times=IDLE)
        self.turn(small, 1, TEN)
        self.turn(small, 2, TEN, tenant="u")
        assert len(small.memory.retentions) == 2
        assert small.memory.pool.columns.pin_counts[:2].tolist() == [2, 2]

    def test_an_idle_session_goes_to_the_host_tier_and_is_held_there(self):
        small = SmallEngine(session_times=IDLE, num_host_slots=4)
        self.turn(small, 1, TEN)
        small.sink.records.clear()
        assert pass_time(small, 100)
        assert small.records() == [
            ("DEMOTE", "SESSION", (0, 1), (0, 1)),
            ("UNPIN", "SESSION", (0, 1), ()),
        ]
        assert small.runner.host[:2].ravel().tolist() == EIGHT
        assert (small.memory.host.num_held, small.engine.account().pinned) == (2, 0)

    def test_its_next_turn_comes_back_from_the_host(self):
        small = SmallEngine(num_blocks=4, session_times=IDLE, num_host_slots=4)
        self.turn(small, 1, TEN)
        pass_time(small, 100)
        small.cache(range(40, 56))
        prompt = [*TEN, 30]
        assert self.turn(small, 2, prompt) == [8]
        assert small.memory.sequences.get(2) is not None
        result = small.resume(2)
        assert (result.first_positions, result.token_ids) == ([8], alone(prompt, 1))
        assert small.engine.account().pinned == 2

    def test_without_a_host_tier_an_idle_session_is_merely_cached(self):
        small = SmallEngine(session_times=IDLE)
        self.turn(small, 1, TEN)
        assert pass_time(small, 100)
        assert small.engine.account() == PoolAccount(total=8, free=6, cached=2)
        assert self.turn(small, 2, [*TEN, 30]) == [8]

    def test_a_session_ends_and_leaves_nothing_held(self):
        small = SmallEngine(session_times=IDLE, num_host_slots=4)
        self.turn(small, 1, TEN)
        pass_time(small, 100)
        assert pass_time(small, 400)
        assert (len(small.memory.retentions), small.memory.host.num_held) == (0, 0)

    def test_one_that_expires_before_it_is_idle_is_not_demoted(self):
        small = SmallEngine(session_times=SessionTimes(idle_ns=0, ttl_ns=50), num_host_slots=4)
        self.turn(small, 1, TEN)
        small.sink.records.clear()
        assert pass_time(small, 50)
        assert small.sink.brief() == [("UNPIN", "EXPIRED", (0, 1))]

    def test_a_full_host_tier_keeps_what_it_has_room_for(self):
        small = SmallEngine(session_times=IDLE, num_host_slots=1)
        self.turn(small, 1, TEN)
        pass_time(small, 100)
        assert (small.memory.host.num_held, small.engine.account().cached) == (1, 2)

    def test_what_a_full_host_tier_has_already_is_held_and_not_dropped_for_the_rest(self):
        small = SmallEngine(num_blocks=4, session_times=IDLE, num_host_slots=1)
        small.cache(TEN[:5])
        # Four sequences that fill no block push the cached one out, and leave four free.
        small.start(*(request(it, [50 + it]) for it in (1, 2, 3, 4)))
        small.engine.cancel([1, 2, 3, 4])
        head = small.memory.host.keys()
        self.turn(small, 5, TEN)
        assert small.resume(5).first_positions == [4]
        assert small.engine.account().pinned == 2
        assert pass_time(small, 100)
        assert small.memory.host.keys() == head
        assert (small.memory.host.num_held, small.engine.account().cached) == (1, 2)

    def test_without_sessions_nothing_is_kept(self):
        small = SmallEngine()
        self.turn(small, 1, TEN)
        assert (len(small.memory.retentions), small.engine.account().pinned) == (0, 0)

    def test_a_cancelled_turn_is_not_kept(self):
        small = SmallEngine(session_times=IDLE)
        small.start(request(1, TEN, session_id="chat", sampling=LONG))
        small.engine.cancel([1])
        assert len(small.memory.retentions) == 0
