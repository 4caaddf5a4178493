"""Another size while requests run: what moves where, what is given up, and what is refused."""

import pytest

from pageframe.core.errors import (
    InvalidRequestError,
    OutOfRangeError,
    PageframeError,
    PreconditionError,
    UnavailableError,
)
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.core.sampling import SamplingParams
from unit.executor.small_engine import ONE_TOKEN, SmallEngine, alone, fork, request
from unit.memory.memories import entries

EIGHT = list(range(10, 18))
TEN = list(range(10, 20))
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


def growing(num_blocks: int = 8, **options) -> SmallEngine:
    return SmallEngine(num_blocks=num_blocks, num_blocks_max=2 * num_blocks, **options)


def refusal_of(small: SmallEngine, num_blocks: int) -> PageframeError:
    """The refusal of a resize, which must have changed nothing."""
    before = small.engine.account(), small.memory.tables.entries.tolist()
    small.sink.records.clear()
    with pytest.raises(PageframeError) as caught:
        small.desk.resize(num_blocks)
    assert (small.engine.account(), small.memory.tables.entries.tolist()) == before
    assert small.sink.records == []
    return caught.value


class TestShrinking:
    def test_held_blocks_move_to_the_lowest_free_ones_and_tables_follow(self):
        small = growing()
        small.start(request(1, [40, 41]), request(2, [50, 51]), request(3, TEN, sampling=SHORT))
        small.start(request(4, [60, 61, 62, 63, 64], sampling=SHORT))
        small.engine.cancel([1, 2])
        assert (small.table(3), small.table(4)) == ([2, 3, 4], [5, 6])
        assert small.free_ids() == [0, 1, 7]
        small.sink.records.clear()
        assert small.desk.resize(5).num_blocks_moved == 2
        assert [it for it in small.records() if it[0] == "MOVE"] == [
            ("MOVE", "RESIZE", (5, 6), (0, 1))
        ]
        assert (small.table(3), small.table(4)) == ([2, 3, 4], [0, 1])
        small.check()

    def test_a_worked_example(self):
        small = growing()
        small.start(request(1, [40, 41, 42]), request(2, TEN, sampling=SHORT))
        small.engine.cancel([1])
        # [ . | 2 | 2 | 2 | . | . | . | . ]  to three blocks
        assert (small.table(2), small.free_ids()) == ([1, 2, 3], [0, 4, 5, 6, 7])
        small.sink.records.clear()
        outcome = small.desk.resize(3)
        assert (outcome.num_blocks_moved, outcome.account) == (1, PoolAccount(total=3, held=3))
        assert small.table(2) == [1, 2, 0]
        assert small.records() == [
            ("MOVE", "RESIZE", (3,), (0,)),
            ("RESIZE", "RESIZE", (3, 4, 5, 6, 7), ()),
        ]
        small.check()
        small.step()
        assert small.output(2) == alone(TEN, 2)

    def test_nothing_moves_when_nothing_lies_behind(self):
        small = growing()
        small.start(request(1, TEN, sampling=SHORT))
        small.sink.records.clear()
        assert small.desk.resize(4).num_blocks_moved == 0
        assert small.records() == [("RESIZE", "RESIZE", (4, 5, 6, 7), ())]

    def test_a_shared_block_moves_once_and_every_table_follows(self):
        small = growing()
        small.start(request(1, [40, 41, 42]))
        small.step(
            announce=[request(2, TEN, sampling=SHORT)],
            may=entries((2, 0, 64)),
            forks=[fork(2, 3)],
        )
        small.engine.cancel([1])
        assert small.desk.resize(3).num_blocks_moved == 1
        assert small.table(2) == small.table(3) == [1, 2, 0]
        assert small.memory.pool.columns.ref_counts[:3].tolist() == [2, 2, 2]

    def test_cached_blocks_are_given_up_only_as_far_as_they_do_not_fit(self):
        small = growing()
        small.cache(range(10, 19), range(30, 39), range(50, 59))
        assert len(small.cached_ids()) == 6
        assert small.desk.resize(4).account == PoolAccount(total=4, cached=4)
        # The chain that was used last is whole, the one used longest ago is gone.
        for prompt, num_cached in ((range(50, 59), 8), (range(30, 39), 8), (range(10, 19), 0)):
            announcement = request(prompt[0], prompt, sampling=ONE_TOKEN)
            assert small.step(announce=[announcement]).num_cached_tokens == [num_cached]

    def test_the_order_of_eviction_moves_along(self):
        small = growing(num_blocks=6)
        small.start(request(1, [40]))
        small.cache(EIGHT, range(60, 64))
        assert small.cached_ids() == [2, 1, 3]
        small.engine.cancel([1])
        small.desk.resize(3)
        # Block 3 moved to 0 and is the youngest still.
        assert small.cached_ids() == [2, 1, 0]
        assert small.step(announce=[request(3, [60, 61, 62, 63, 1])]).num_cached_tokens == [4]

    def test_hits_inside_a_block_are_found_where_it_went(self):
        small = growing()
        small.start(request(1, [40, 41]))
        small.cache(EIGHT)
        small.engine.cancel([1])
        assert small.desk.resize(2).num_blocks_moved == 1
        assert small.step(announce=[request(2, [*EIGHT[:6], 50])]).num_cached_tokens == [6]

    def test_pins_follow_and_are_given_back_where_they_are(self):
        small = growing()
        small.start(request(1, [40, 41]))
        small.cache(EIGHT)
        small.desk.retain(tenant="t", cache_salt=b"", name="h", token_ids=EIGHT, ttl_ns=9, now_ns=0)
        small.engine.cancel([1])
        small.desk.resize(2)
        assert small.memory.pool.columns.pin_counts[:2].tolist() == [1, 1]
        assert sorted(small.memory.retentions.pinned_block_ids()) == [0, 1]
        small.desk.release(tenant="t", name="h")
        assert small.engine.account() == PoolAccount(total=2, cached=2)

    def test_the_quota_of_a_tenant_is_charged_as_before(self):
        small = growing()
        small.start(request(1, [40, 41, 42]))
        small.start(request(2, TEN, tenant="t", sampling=SHORT))
        small.engine.cancel([1])
        small.desk.resize(3)
        assert small.memory.num_held_by_tenant()["t"] == 3

    def test_the_sequence_goes_on_with_its_tokens_after_every_move(self):
        small = growing()
        small.start(request(1, [40, 41, 42]), request(2, TEN, sampling=SHORT))
        small.engine.cancel([1])
        for num_blocks in (3, 8, 4, 16, 3):
            small.desk.resize(num_blocks)
            small.check()
        small.step()
        small.step()
        assert small.output(2) == alone(TEN, 3)

    def test_blocks_that_could_not_be_moved_are_not_taken_for_moved(self):
        small = growing()
        small.start(request(1, [40, 41, 42]), request(2, TEN, sampling=SHORT))
        small.engine.cancel([1])
        small.runner.fail_next_move = True
        with pytest.raises(RuntimeError, match="on fire"):
            small.desk.resize(3)
        assert small.engine.account().total == 8
        # Either it stands where it stood, or it has ended; never on blocks without its tokens.
        small.check()
        assert small.start(request(3, TEN, sampling=ONE_TOKEN)).token_ids[-1:] == alone(TEN, 1)

    def test_evicted_blocks_go_to_the_host_tier_first(self):
        small = growing(num_blocks=4, num_host_slots=4)
        small.cache(EIGHT, range(30, 38))
        small.desk.resize(2)
        assert small.memory.host.num_used == 2
        assert small.runner.host[:2].ravel().tolist() == [14, 15, 16, 17, 10, 11, 12, 13]


class TestGrowing:
    def test_new_blocks_are_free_and_taken_before_the_others(self):
        small = growing(num_blocks=2)
        small.start(request(1, [40, 41], sampling=SHORT))
        small.sink.records.clear()
        outcome = small.desk.resize(4)
        assert outcome.account == PoolAccount(total=4, free=3, held=1)
        assert small.records() == [("RESIZE", "RESIZE", (), (2, 3))]
        small.start(request(2, [50, 51, 52]))
        assert small.table(2) == [2]

    def test_what_was_refused_for_room_is_taken_now(self):
        small = growing(num_blocks=2)
        assert small.start(request(1, TEN, sampling=SHORT)).refused_ids == [1]
        small.desk.resize(3)
        assert small.resume(1).refused_ids == []

    def test_a_block_that_was_away_comes_back_empty_of_history(self):
        small = growing(num_blocks=4)
        small.start(request(1, TEN, sampling=SHORT))
        small.engine.cancel([1])
        small.desk.resize(2)
        small.desk.resize(4)
        facts = small.memory.pool.explain(3)
        assert (facts.sequence_id, facts.num_references, facts.is_indexed) == (0, 0, False)
        assert small.engine.account().total == 4

    def test_the_same_size_changes_nothing(self):
        small = growing()
        small.start(request(1, TEN, sampling=SHORT))
        before = small.engine.account()
        assert small.desk.resize(8).num_blocks_moved == 0
        assert small.engine.account() == before

    def test_a_runner_that_cannot_grow_leaves_the_pool_as_it_was(self):
        small = growing(num_blocks=2)

        def refuse(num_blocks: int) -> None:
            raise OutOfRangeError("KV_ARENA_TOO_LARGE", "no memory", num_blocks=num_blocks)

        small.runner.resize_pool = refuse
        assert refusal_of(small, 4).reason == "KV_ARENA_TOO_LARGE"


class TestRefusals:
    def test_no_blocks_at_all(self):
        error = refusal_of(growing(), 0)
        assert isinstance(error, InvalidRequestError)
        assert (error.reason, error.limits) == ("RESIZE_TOO_SMALL", {"num_blocks": "0"})

    def test_more_than_was_reserved(self):
        error = refusal_of(growing(), 17)
        assert isinstance(error, OutOfRangeError)
        assert error.reason == "RESIZE_ABOVE_RESERVED"
        assert error.limits == {"num_blocks": "17", "num_blocks_max": "16"}

    def test_fewer_than_are_pinned(self):
        small = growing()
        small.cache(EIGHT)
        small.desk.retain(tenant="t", cache_salt=b"", name="h", token_ids=EIGHT, ttl_ns=9, now_ns=0)
        error = refusal_of(small, 1)
        assert isinstance(error, PreconditionError)
        assert error.reason == "RESIZE_BELOW_PINNED"
        assert error.limits == {
            "num_blocks": "1",
            "num_usable_blocks": "1",
            "num_needed_blocks": "2",
        }

    def test_fewer_than_are_held(self):
        small = growing()
        small.start(request(1, TEN, sampling=SHORT))
        error = refusal_of(small, 2)
        assert (error.reason, error.limits["num_needed_blocks"]) == ("RESIZE_BELOW_HELD", "3")

    def test_fewer_than_the_longest_sequence_may_come_to_need(self):
        small = growing()
        small.step(announce=[request(1, TEN, sampling=SamplingParams(max_tokens=8))])
        # 10 tokens of prompt, 7 of output that are computed: five blocks.
        error = refusal_of(small, 4)
        assert error.reason == "RESIZE_BELOW_RUNNING"
        assert error.limits == {
            "num_blocks": "4",
            "num_usable_blocks": "4",
            "num_needed_blocks": "5",
        }
        assert small.desk.resize(5).account.total == 5

    def test_fewer_than_the_floors_of_tenants(self):
        small = growing()
        small.desk.set_quota(TenantQuota(tenant="a", floor_blocks=3))
        small.desk.set_quota(TenantQuota(tenant="b", floor_blocks=2))
        assert refusal_of(small, 4).reason == "QUOTA_FLOORS_EXCEED_POOL"
        assert small.desk.resize(5).account.total == 5

    def test_while_a_step_is_in_flight(self):
        small = growing()
        small.memory.pool.launch(1)
        error = refusal_of(small, 4)
        assert isinstance(error, UnavailableError)
        assert error.reason == "STEP_IN_FLIGHT"
        small.memory.pool.complete(1)
        assert small.desk.resize(4).account.total == 4

    def test_blocks_in_quarantine_are_no_place_to_move_to(self):
        small = growing(num_blocks=4, is_checked=False)
        small.start(request(1, [40, 41, 42], sampling=ONE_TOKEN))
        small.start(request(2, [40, 41, 42]))
        small.start(request(3, TEN, sampling=SHORT))
        small.memory.pool.columns.ref_counts[small.table(2)] += 1
        small.engine.check_integrity()
        small.engine.cancel([2])
        account = small.engine.account()
        assert (account.held, account.quarantined) == (3, 1)
        error = refusal_of(small, 3)
        assert error.reason == "RESIZE_BELOW_HELD"

    def test_a_block_in_quarantine_leaves_with_the_end_of_the_pool(self):
        small = growing(num_blocks=4, is_checked=False)
        small.start(request(1, TEN, sampling=SHORT), request(2, [40, 41, 42], sampling=SHORT))
        small.memory.pool.columns.ref_counts[small.table(2)] += 1
        small.engine.check_integrity()
        small.engine.cancel([2])
        assert small.engine.account().quarantined == 1
        assert small.desk.resize(3).account == PoolAccount(total=3, held=3)
        assert small.desk.resize(4).account == PoolAccount(total=4, held=3, free=1)
