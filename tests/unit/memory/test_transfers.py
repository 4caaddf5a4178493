"""Moves between device and host: their order, what they hold meanwhile, what a failure loses."""

import contextlib

import numpy as np
import pytest

from pageframe.core.plan import Recovery
from pageframe.core.replica import PoolAccount
from pageframe.core.step import FinishReason, RefusedBecause
from pageframe.executor.memory.block_keys import chain_keys
from pageframe.executor.memory.retaining import SessionTimes
from unit.executor.small_engine import LONG, SmallEngine, alone, request
from unit.memory.memories import Harness, announcement, entries

EIGHT = list(range(10, 18))
TEN = list(range(10, 20))
OTHERS = list(range(40, 56))


def with_host(num_blocks: int = 4, num_host_slots: int = 8, **options) -> SmallEngine:
    return SmallEngine(num_blocks=num_blocks, num_host_slots=num_host_slots, **options)


def keys_of(small: SmallEngine, token_ids) -> list[bytes]:
    tokens = np.array(token_ids, dtype=np.int32)
    return chain_keys(small.memory.root_key(b""), tokens, 4)


class TestDemotion:
    def test_evicted_blocks_are_copied_out_before_their_next_owner_writes(self):
        small = with_host(num_blocks=2)
        small.cache(EIGHT)
        small.start(request(1, OTHERS[:8]))
        # Blocks 0 and 1 were evicted, copied out, taken again and overwritten in one step.
        assert small.records()[:4] == [
            ("DEMOTE", "POOL_PRESSURE", (1,), (0,)),
            ("DEMOTE", "POOL_PRESSURE", (0,), (1,)),
            ("EVICT", "POOL_PRESSURE", (1, 0), ()),
            ("FREE", "POOL_PRESSURE", (1, 0), ()),
        ]
        assert small.runner.host[:2].tolist() == [EIGHT[4:], EIGHT[:4]]
        assert sorted(small.table(1)) == [0, 1]

    def test_what_the_host_has_already_is_not_copied_again(self):
        small = with_host(num_blocks=2)
        small.cache(EIGHT, OTHERS[:8], [*EIGHT, 18][:8])
        small.cache(OTHERS[8:16])
        assert [it for it in small.records() if it[0] == "DEMOTE"] == []
        assert small.memory.host.num_used == 4

    def test_a_full_tier_drops_what_was_used_longest_ago(self):
        small = with_host(num_blocks=2, num_host_slots=2)
        small.cache(EIGHT, OTHERS[:8], OTHERS[8:16])
        assert [key in small.memory.host for key in keys_of(small, OTHERS[:8])] == [True, True]
        assert [key in small.memory.host for key in keys_of(small, EIGHT)] == [False, False]

    def test_without_a_tier_nothing_is_copied(self):
        small = SmallEngine(num_blocks=2)
        small.cache(EIGHT, OTHERS[:8])
        assert small.memory.host.num_used == 0

    def test_copies_out_of_one_step_never_share_a_slot(self):
        small = with_host(num_blocks=4, num_host_slots=3)
        small.cache(OTHERS)
        small.start(request(1, range(60, 76)))
        slots = [it[3][0] for it in small.records() if it[0] == "DEMOTE"]
        assert sorted(slots) == [0, 1, 2]


class TestPromotion:
    def test_it_takes_one_step_and_the_next_try_finds_ordinary_hits(self):
        small = with_host()
        small.cache(EIGHT, OTHERS)
        result = small.start(request(1, TEN))
        assert (result.num_cached_tokens, result.refused_because) == (
            [8],
            [RefusedBecause.PROMOTING],
        )
        assert small.memory.sequences.get(1).row < 0
        promoted = [it for it in small.records() if it[0] == "PROMOTE"]
        assert [(len(it[2]), len(it[3])) for it in promoted] == [(2, 2)]
        result = small.resume(1)
        assert (result.first_positions, result.refused_ids) == ([8], [])
        assert small.output(1) == alone(TEN, 1)

    def test_it_blocks_nobody_behind_it(self):
        small = with_host(num_blocks=5)
        small.cache(EIGHT, [*OTHERS, 56])
        result = small.start(request(1, TEN), request(2, [60, 61]))
        assert (result.refused_ids, result.sampled_ids) == ([1], [2])

    def test_what_arrives_is_held_until_the_step_is_over(self):
        harness = Harness(num_blocks=4, num_host_slots=8, has_prefix_cache=True)
        for sequence_id in (1, 2):
            harness.run(announce=[announcement(sequence_id, 16)], may=entries((sequence_id, 0, 16)))
            harness.run(finish=[sequence_id])
        harness.sink.records.clear()
        applied = harness.apply(announce=[announcement(1, 6)], may=entries((1, 0, 6)))
        assert applied.result.refused_because == [RefusedBecause.PROMOTING]
        (arriving,) = harness.memory.transfers.arriving_ids()
        assert harness.memory.pool.account().held == 1
        assert not harness.memory.pool.index.is_indexed[arriving]
        harness.memory.transfers.take()
        harness.memory.transfers.finish()
        assert harness.memory.transfers.arriving_ids() == []
        assert harness.memory.pool.index.is_indexed[arriving]
        assert harness.memory.pool.account() == harness.memory.account().__class__(
            total=4, cached=4
        )

    def test_it_begins_where_the_hits_on_the_device_end(self):
        small = with_host(num_blocks=5)
        small.cache(range(10, 22), [*OTHERS[:11], 60])
        # Tail first: the last block or two of the chain are in the host tier, the head is not.
        num_on_device = len(small.memory.pool.index.match(keys_of(small, range(10, 22))))
        assert 0 < num_on_device < 3
        small.start(request(1, range(10, 23)))
        (promoted,) = [it for it in small.records() if it[0] == "PROMOTE"]
        assert len(promoted[3]) == 3 - num_on_device
        assert small.resume(1).first_positions == [12]

    def test_a_promoted_tail_is_evicted_before_its_head(self):
        small = with_host(num_blocks=4)
        small.cache(range(10, 22))
        # Push out the tail of the chain alone, by one block that is never full.
        small.start(request(1, [60]), request(2, [61]))
        small.engine.cancel([1, 2])
        assert small.start(request(3, range(10, 23))).refused_because == [RefusedBecause.PROMOTING]
        depths = small.memory.pool.columns.depths[small.cached_ids()].tolist()
        assert depths == [2, 1, 0]

    def test_a_pool_without_room_refuses_and_brings_nothing_in(self):
        small = with_host(num_blocks=3)
        small.cache(EIGHT)
        small.start(request(1, OTHERS[:11]))
        small.sink.records.clear()
        result = small.start(request(2, TEN))
        assert result.refused_because == [RefusedBecause.POOL_FULL]
        assert [it for it in small.records() if it[0] == "PROMOTE"] == []

    def test_of_two_who_want_the_same_both_find_it_next(self):
        small = with_host(num_blocks=6)
        small.cache(EIGHT, [*OTHERS, *range(60, 68)])
        result = small.start(request(1, TEN), request(2, [*EIGHT, 30]))
        assert result.refused_because == [RefusedBecause.PROMOTING] * 2
        result = small.step(may=entries((1, 0, 64), (2, 0, 64)))
        assert result.first_positions == [8, 8]
        assert small.table(1)[:2] == small.table(2)[:2]


class TestFailure:
    def test_failed_moves_lose_no_block_and_the_next_request_works(self):
        small = with_host()
        small.cache(EIGHT, OTHERS)
        small.runner.fail_next_move = True
        result = small.start(request(1, TEN))
        assert result.refused_because == [RefusedBecause.PROMOTING]
        assert small.engine.account().held == 0
        assert small.memory.sequences.get(1) is not None
        while small.memory.sequences.get(1).row < 0:
            small.resume(1)
        assert small.output(1) == alone(TEN, 1)

    def test_keys_that_were_to_be_stored_in_that_step_are_gone(self):
        small = with_host(num_blocks=2)
        small.cache(EIGHT)
        small.runner.fail_next_move = True
        result = small.start(request(1, OTHERS[:8]))
        assert result.finish_reasons == [FinishReason.ERROR]
        assert small.memory.host.num_used == 0
        assert small.engine.account() == PoolAccount(total=2, free=2, host_total=8)
        assert small.start(request(2, EIGHT)).first_positions == [0]
        assert small.output(2) == alone(EIGHT, 1)

    def test_keys_that_were_stored_before_stay(self):
        small = with_host(num_blocks=2)
        small.cache(EIGHT, OTHERS[:8])
        small.runner.fail_next_move = True
        small.start(request(1, OTHERS[8:16]))
        assert all(key in small.memory.host for key in keys_of(small, EIGHT))
        assert not any(key in small.memory.host for key in keys_of(small, OTHERS[:8]))

    @pytest.mark.parametrize("is_move", [True, False], ids=["move", "execute"])
    def test_a_sequence_that_was_being_swapped_out_is_computed_again(self, is_move):
        small = with_host()
        small.start(request(1, TEN), request(2, [60, 61]))
        small.preempt(1, Recovery.SWAP)
        small.runner.fail_next_move, small.runner.fail_next = is_move, not is_move
        result = small.step()
        assert dict(zip(result.sampled_ids, result.finish_reasons, strict=True)) == {
            2: FinishReason.ERROR
        }
        assert small.memory.host.num_held == 0
        assert small.memory.sequences.get(1).host_keys == []
        while small.memory.sequences.get(1).row < 0:
            small.resume(1)
        assert small.output(1) == alone(TEN, 2)

    def test_a_failed_demotion_of_a_session_holds_nothing(self):
        small = with_host(session_times=SessionTimes(idle_ns=100, ttl_ns=500))
        small.cache(TEN, session_id="chat")
        assert small.engine.account().pinned == 2
        small.runner.fail_next_move = True
        small.clock.advance_ns(100)
        with contextlib.suppress(RuntimeError):
            small.desk.pass_time()
        small.check()
        assert (small.memory.host.num_held, small.memory.host.num_used) == (0, 0)
        assert small.start(request(1, TEN)).first_positions == [8]

    def test_a_copy_on_write_that_failed_ends_its_writer_and_spares_the_original(self):
        small = SmallEngine()
        small.cache(EIGHT)
        small.runner.fail_next_move = True
        assert small.start(request(1, EIGHT)).finish_reasons == [FinishReason.ERROR]
        assert small.engine.account() == PoolAccount(total=8, free=6, cached=2)
        small.start(request(2, EIGHT, sampling=LONG))
        assert small.output(2) == alone(EIGHT, 1)


class TestMoves:
    def test_each_move_is_handed_out_once(self):
        harness = Harness(has_prefix_cache=True)
        harness.memory.transfers.copy([1, 2], [3, 4])
        moves = harness.memory.transfers.take()
        assert (moves.copy_sources.tolist(), moves.copy_targets.tolist()) == ([1, 2], [3, 4])
        assert len(moves) == 2
        assert harness.memory.transfers.take() is None
