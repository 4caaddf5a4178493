"""What may be asked of KV memory between steps: snapshots, explanations, blocks in and out."""

import numpy as np
import pytest

from pageframe.core.errors import (
    InvalidRequestError,
    NotFoundError,
    OutOfRangeError,
    PageframeError,
    PreconditionError,
)
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.core.trace import KvCause
from pageframe.executor import desk as desk_module
from pageframe.executor.memory.block_keys import BlockKey, chain_keys
from pageframe.executor.memory.retaining import SessionTimes
from pageframe.wire.memory_facts import BLOCK_STATE_NAMES, RetentionKind
from unit.executor.small_engine import ONE_TOKEN, SmallEngine, alone, fork, request
from unit.memory.memories import entries

EIGHT = list(range(10, 18))
TEN = list(range(10, 20))


def keys_of(small: SmallEngine, token_ids) -> list[BlockKey]:
    return chain_keys(small.memory.root_key(b""), np.array(token_ids, dtype=np.int32), 4)


def retain(small: SmallEngine, token_ids=EIGHT, name: str = "h", **changes):
    facts = {"tenant": "t", "cache_salt": b"", "ttl_ns": 100, "now_ns": small.clock.now_ns()}
    return small.desk.retain(name=name, token_ids=token_ids, **(facts | changes))


class TestSnapshot:
    def test_it_shows_blocks_tables_pins_quotas_and_the_host(self):
        small = SmallEngine(num_host_slots=4)
        small.step(
            announce=[request(1, TEN, tenant="t", request_id="r-1")],
            may=entries((1, 0, 64)),
            forks=[fork(1, 2)],
        )
        retain(small)
        small.desk.set_quota(TenantQuota(tenant="t", ceiling_blocks=7))
        snapshot = small.desk.snapshot()
        names = [BLOCK_STATE_NAMES[state] for state in snapshot.states.tolist()]
        assert names == ["held"] * 3 + ["free"] * 5
        assert snapshot.ref_counts.tolist() == [3, 3, 2, 0, 0, 0, 0, 0]
        assert snapshot.pin_counts.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
        assert snapshot.is_indexed.tolist() == [True, True] + [False] * 6
        assert [(it.sequence_id, it.block_ids, it.tenant) for it in snapshot.tables] == [
            (1, [0, 1, 2], "t"),
            (2, [0, 1, 2], "t"),
        ]
        assert [(it.request_id, it.num_computed) for it in snapshot.tables] == [("r-1", 10)] * 2
        (kept,) = snapshot.retentions
        assert (kept.name, kept.kind, kept.num_blocks_pinned) == ("h", RetentionKind.HANDLE, 2)
        (usage,) = snapshot.quotas
        assert (usage.quota.ceiling_blocks, usage.num_blocks_held) == (7, 3)
        assert (snapshot.host.num_slots, snapshot.host.num_used) == (4, 0)
        assert (snapshot.step, snapshot.block_size) == (1, 4)
        assert snapshot.account == small.engine.account()

    def test_it_stays_as_it_is_while_the_pool_goes_on(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        snapshot = small.desk.snapshot()
        small.engine.cancel([1])
        assert snapshot.ref_counts[:3].tolist() == [1, 1, 1]
        assert snapshot.tables[0].block_ids == [0, 1, 2]

    def test_sequences_that_wait_have_no_table(self):
        small = SmallEngine()
        small.step(announce=[request(1, TEN)])
        assert small.desk.snapshot().tables == []

    def test_it_says_what_left_the_window(self):
        small = SmallEngine(window_tokens=6)
        small.start(request(1, TEN))
        (table,) = small.desk.snapshot().tables
        assert (table.first_block, table.block_ids) == (1, [1, 2])

    def test_it_ends_where_the_pool_ends(self):
        small = SmallEngine(num_blocks=4, num_blocks_max=8)
        assert len(small.desk.snapshot().states) == 4
        small.desk.resize(6)
        assert len(small.desk.snapshot().states) == 6


class TestExplain:
    def test_who_holds_a_block_why_and_since_when(self):
        small = SmallEngine()
        small.step(
            announce=[request(1, TEN, tenant="t")], may=entries((1, 0, 64)), forks=[fork(1, 2)]
        )
        retain(small)
        told = small.desk.explain(1)
        assert BLOCK_STATE_NAMES[told.state] == "held"
        assert (told.num_references, told.num_pins, told.is_indexed) == (3, 1, True)
        assert (told.sequence_ids, told.tenant) == ([1, 2], "t")
        assert [kept.name for kept in told.retentions] == ["h"]
        assert (told.cause, told.step) == (KvCause.PREFILL, 1)

    def test_a_cached_block_has_nobody_and_a_reason(self):
        small = SmallEngine()
        small.cache(TEN)
        told = small.desk.explain(0)
        assert (BLOCK_STATE_NAMES[told.state], told.sequence_ids) == ("cached", [])
        assert told.cause is KvCause.FINISHED

    @pytest.mark.parametrize("block_id", [-1, 8])
    def test_a_block_that_does_not_exist(self, block_id):
        with pytest.raises(PageframeError) as caught:
            SmallEngine().desk.explain(block_id)
        assert isinstance(caught.value, OutOfRangeError | NotFoundError)
        assert caught.value.limits == {"block_id": str(block_id), "num_blocks": "8"}


class TestRetain:
    @pytest.mark.parametrize(
        ("ttl_ns", "kind", "reason"),
        [
            (0, InvalidRequestError, "HANDLE_TTL_NOT_POSITIVE"),
            (-5, InvalidRequestError, "HANDLE_TTL_NOT_POSITIVE"),
            (24 * 3600 * 10**9 + 1, OutOfRangeError, "HANDLE_TTL_ABOVE_MAX"),
        ],
    )
    def test_a_time_to_live_that_cannot_be(self, ttl_ns, kind, reason):
        small = SmallEngine()
        small.cache(TEN)
        with pytest.raises(kind) as caught:
            retain(small, ttl_ns=ttl_ns)
        assert caught.value.reason == reason
        assert small.engine.account().pinned == 0

    def test_it_ends_by_the_clock_of_the_desk(self):
        small = SmallEngine()
        small.cache(TEN)
        assert retain(small).expire_ns == small.clock.now_ns() + 100
        assert small.desk.next_due_ns == small.clock.now_ns() + 100


class TestQuotas:
    def test_the_answer_says_what_the_tenant_holds_now(self):
        small = SmallEngine()
        small.start(request(1, TEN, tenant="t"))
        assert small.desk.set_quota(TenantQuota(tenant="t", ceiling_blocks=1)) == 3
        assert small.desk.set_quota(TenantQuota(tenant="stranger", floor_blocks=1)) == 0

    @pytest.mark.parametrize(
        ("quota", "kind", "reason"),
        [
            (TenantQuota(tenant="t", floor_blocks=-1), InvalidRequestError, "QUOTA_NEGATIVE"),
            (
                TenantQuota(tenant="t", floor_blocks=3, ceiling_blocks=2),
                InvalidRequestError,
                "QUOTA_FLOOR_ABOVE_CEILING",
            ),
            (
                TenantQuota(tenant="t", floor_blocks=9),
                PreconditionError,
                "QUOTA_FLOORS_EXCEED_POOL",
            ),
        ],
    )
    def test_a_quota_that_cannot_be_leaves_the_old_ones(self, quota, kind, reason):
        small = SmallEngine()
        small.desk.set_quota(TenantQuota(tenant="t", ceiling_blocks=5))
        with pytest.raises(kind) as caught:
            small.desk.set_quota(quota)
        assert caught.value.reason == reason
        assert small.memory.quotas.quota_of("t").ceiling_blocks == 5

    def test_a_hello_replaces_them_all(self):
        small = SmallEngine()
        small.desk.set_quota(TenantQuota(tenant="t", ceiling_blocks=5))
        small.desk.replace_quotas([TenantQuota(tenant="u", floor_blocks=2)])
        assert [quota.tenant for quota in small.memory.quotas] == ["u"]

    def test_a_hello_is_let_in_whose_floors_a_shrunk_pool_cannot_hold(self):
        small = SmallEngine(num_blocks=8, num_blocks_max=16)
        floors = [
            TenantQuota(tenant="t", floor_blocks=4, ceiling_blocks=4),
            TenantQuota(tenant="u", floor_blocks=2),
        ]
        small.desk.replace_quotas(floors)
        small.desk.replace_quotas([])
        small.desk.resize(3)
        small.desk.replace_quotas(floors)
        assert dict(small.memory.quotas.floors()) == {"t": 2, "u": 1}
        assert small.memory.quotas.quota_of("t").ceiling_blocks == 4
        # They grow with the pool, but for those that an operator has set since.
        small.desk.set_quota(TenantQuota(tenant="u", floor_blocks=0))
        small.desk.resize(8)
        assert dict(small.memory.quotas.floors()) == {"t": 4}


class TestBlocksInAndOut:
    def test_a_block_is_exported_from_the_device_and_from_the_host(self):
        small = SmallEngine(num_blocks=2, num_host_slots=4)
        small.cache(EIGHT)
        keys = keys_of(small, EIGHT)
        on_device = [small.desk.export_block(key) for key in keys]
        assert on_device == [np.array(it, np.int32).tobytes() for it in (EIGHT[:4], EIGHT[4:])]
        small.cache(range(40, 48))
        assert [small.desk.export_block(key) for key in keys] == on_device
        assert small.desk.export_block(bytes(32)) is None

    def test_an_imported_block_is_promoted_like_any_other(self):
        giver, taker = SmallEngine(), SmallEngine(num_host_slots=4)
        giver.cache(EIGHT)
        for key in keys_of(giver, EIGHT):
            assert taker.desk.import_block(key, giver.desk.export_block(key))
        assert taker.start(request(1, TEN)).num_cached_tokens == [8]
        assert taker.resume(1).first_positions == [8]
        assert taker.output(1) == alone(TEN, 1)

    def test_what_is_here_already_is_not_written_again(self):
        small = SmallEngine(num_host_slots=4)
        small.cache(EIGHT)
        key = keys_of(small, EIGHT)[0]
        assert small.desk.import_block(key, b"wrong, and not looked at")
        assert small.memory.host.num_used == 0

    def test_without_room_nothing_is_taken_in(self):
        small = SmallEngine()
        assert not small.desk.import_block(bytes(32), bytes(16))
        small = SmallEngine(num_host_slots=1)
        small.memory.host.store(b"k" * 32)
        assert not small.desk.import_block(bytes(32), bytes(16))

    def test_bytes_that_cannot_be_written_leave_no_key_behind(self):
        """A key whose content never came: the next request would be served garbage."""
        small = SmallEngine(num_host_slots=4)
        key = keys_of(small, EIGHT)[0]
        with pytest.raises(ValueError, match="buffer"):
            small.desk.import_block(key, b"abc")
        assert key not in small.memory.host
        assert small.memory.host.check() == []
        assert small.start(request(1, TEN)).first_positions == [0]
        assert small.output(1) == alone(TEN, 1)


class TestTime:
    def test_nothing_is_due_where_nothing_is_kept(self):
        small = SmallEngine()
        assert small.desk.next_due_ns == 0
        assert not small.desk.pass_time()

    def test_what_is_due_first_is_told(self):
        small = SmallEngine(session_times=SessionTimes(idle_ns=40, ttl_ns=500))
        retain(small, ttl_ns=300)
        small.start(request(1, TEN, session_id="chat", sampling=ONE_TOKEN))
        assert small.desk.next_due_ns == small.clock.now_ns() + 40
        small.clock.advance_ns(40)
        assert small.desk.pass_time()
        assert small.desk.next_due_ns == small.clock.now_ns() + 260
        assert small.engine.account() == PoolAccount(total=8, free=6, held=2, pinned=2)

    def test_time_passes_outside_any_step(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        retain(small)
        small.sink.records.clear()
        small.clock.advance_ns(100)
        small.desk.pass_time()
        assert {(it.operation.name, it.step) for it in small.sink.records} == {("UNPIN", 0)}


class TestRest:
    def rest(self, small: SmallEngine) -> int:
        """How many blocks have memory after a rest that was long enough."""
        while small.desk.use_rest():
            pass
        return small.runner.num_blocks_taken

    def test_memory_is_taken_for_some_blocks_above_those_in_use(self, monkeypatch):
        small = SmallEngine()
        monkeypatch.setattr(desk_module, "_BYTES_AHEAD", 2 * small.runner.block_bytes)
        assert self.rest(small) == 0
        small.cache(TEN, [*TEN, *TEN])
        assert small.engine.account() == PoolAccount(total=8, free=3, cached=5)
        assert self.rest(small) == 5 + 2

    def test_no_memory_is_taken_above_the_pool(self):
        small = SmallEngine()
        small.cache(TEN)
        assert self.rest(small) == 8
