"""Ways to give blocks up while a sequence lives on: recompute, swap, tail, and windows."""

import pytest

from pageframe.core.plan import Recovery, Victims
from pageframe.core.replica import PoolAccount
from pageframe.core.step import RefusedBecause
from pageframe.core.trace import KvCause
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.sequence_table import SequenceState
from unit.executor.small_engine import SmallEngine, alone, fork, request
from unit.memory.memories import entries

SIX = list(range(10, 16))
EIGHT = list(range(10, 18))
TEN = list(range(10, 20))


def swapping(num_host_slots: int = 8, **options) -> SmallEngine:
    return SmallEngine(num_host_slots=num_host_slots, **options)


def offered(*rows: tuple[int, Recovery, int]) -> Victims:
    """Rows of sequence id, recovery, blocks; all of generation 0."""
    made = Victims()
    for sequence_id, recovery, num_blocks in rows:
        made.add(sequence_id, 0, recovery, 0, num_blocks)
    return made


class TestRecompute:
    def test_all_blocks_go_and_the_tokens_stay(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        small.sink.records.clear()
        assert small.preempt(1, Recovery.RECOMPUTE) == (Recovery.RECOMPUTE, 3, 0)
        sequence = small.memory.sequences.get(1)
        assert (sequence.state, sequence.generation) == (SequenceState.PREEMPTED, 1)
        assert small.tokens(1) == [*TEN, *alone(TEN, 1)]
        assert small.sink.brief() == [
            ("RELEASE", "PREEMPTED", (0, 1, 2)),
            ("FREE", "PREEMPTED", (2,)),
        ]

    def test_what_was_published_is_found_again(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        small.preempt(1, Recovery.RECOMPUTE)
        result = small.resume(1)
        assert (result.first_positions, result.num_computed) == ([8], [11])
        for _ in range(3):
            small.step()
        assert small.output(1) == alone(TEN, 5)

    def test_blocks_that_others_share_stay(self):
        small = SmallEngine()
        small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
        assert small.preempt(1, Recovery.RECOMPUTE) == (Recovery.RECOMPUTE, 3, 0)
        assert small.engine.account() == PoolAccount(total=8, free=5, held=3)
        small.check()


class TestSwap:
    def test_every_block_goes_to_the_host_tier_and_is_held_there(self):
        small = swapping()
        small.start(request(1, TEN))
        small.sink.records.clear()
        assert small.preempt(1, Recovery.SWAP) == (Recovery.SWAP, 3, 0)
        assert small.records() == [
            ("SWAP_OUT", "SWAP", (0, 1, 2), (0, 1, 2)),
            ("RELEASE", "PREEMPTED", (0, 1, 2), ()),
            ("FREE", "PREEMPTED", (2,), ()),
        ]
        host = small.memory.host
        assert (host.num_used, host.num_held) == (3, 3)
        assert small.memory.sequences.get(1).swapped_tail[1:] == (2, 2)
        small.step()
        assert small.runner.host[:2].ravel().tolist() == EIGHT
        assert small.runner.host[2, :2].tolist() == TEN[8:]

    def test_what_is_on_the_device_still_is_not_brought_in(self):
        small = swapping()
        small.start(request(1, TEN))
        small.preempt(1, Recovery.SWAP)
        small.sink.records.clear()
        result = small.resume(1)
        # The two full blocks are cached; only the last one has to come from the host.
        assert result.refused_because == [RefusedBecause.PROMOTING]
        assert small.records() == [
            ("SHARE", "SWAP", (0, 1), ()),
            ("ALLOCATE", "SWAP", (2,), ()),
            ("SWAP_IN", "SWAP", (2,), (2,)),
            ("INDEX", "SWAP", (2,), ()),
            ("RELEASE", "SWAP", (0, 1, 2), ()),
        ]
        # Let go as one chain, so that its tail is evicted before its head.
        assert small.cached_ids() == [2, 1, 0]

    def test_the_next_try_finds_everything_and_computes_only_what_is_new(self):
        small = swapping()
        small.start(request(1, TEN))
        small.preempt(1, Recovery.SWAP)
        small.resume(1)
        small.sink.records.clear()
        result = small.resume(1)
        assert (result.refused_ids, result.first_positions) == ([], [10])
        # Nobody else can ask for the last block, so it is written in place again.
        assert small.records() == [
            ("SHARE", "PREFIX_HIT", (0, 1, 2), ()),
            ("UNINDEX", "SWAP", (2,), ()),
        ]
        assert small.table(1) == [0, 1, 2]
        assert (small.memory.host.num_held, small.memory.host.num_used) == (0, 2)
        for _ in range(3):
            small.step()
        assert small.output(1) == alone(TEN, 5)

    def test_everything_comes_back_when_the_device_has_forgotten_it(self):
        small = swapping(num_blocks=4)
        small.start(request(1, TEN))
        small.preempt(1, Recovery.SWAP)
        small.cache(range(40, 54))
        small.sink.records.clear()
        assert small.resume(1).refused_because == [RefusedBecause.PROMOTING]
        (swapped_in,) = [it for it in small.records() if it[0] == "SWAP_IN"]
        assert swapped_in[2] == (0, 1, 2)
        assert small.resume(1).first_positions == [10]
        assert small.output(1) == alone(TEN, 2)

    def test_a_sequence_whose_blocks_are_all_full_needs_no_key_of_its_own(self):
        small = swapping()
        small.start(request(1, EIGHT))
        small.preempt(1, Recovery.SWAP)
        assert small.memory.sequences.get(1).swapped_tail is None
        small.step()
        assert small.resume(1).first_positions == [8]

    def test_blocks_that_the_host_has_already_are_held_and_not_copied(self):
        small = swapping(num_blocks=3)
        small.cache(EIGHT)
        small.start(request(2, range(40, 49)))
        small.engine.cancel([2])
        small.start(request(1, TEN))
        while small.memory.sequences.get(1).row < 0:
            small.resume(1)
        small.sink.records.clear()
        small.preempt(1, Recovery.SWAP)
        (swapped_out,) = [it for it in small.records() if it[0] == "SWAP_OUT"]
        assert len(swapped_out[2]) == 1
        assert small.memory.host.num_held == 3

    def test_what_lies_behind_a_gap_is_not_brought_in(self):
        small = swapping(num_blocks=4)
        small.start(request(1, TEN))
        small.preempt(1, Recovery.SWAP)
        small.cache(range(40, 54))
        sequence, host = small.memory.sequences.get(1), small.memory.host
        # The copy of the second block is lost, as when it found no room.
        lost = sequence.host_keys.pop(1)
        host.drop_hold(lost)
        host.remove(lost)
        assert [content.depth for content in small.memory.match(sequence).promotions] == [0]
        assert small.resume(1).refused_because == [RefusedBecause.PROMOTING]
        assert small.resume(1).first_positions == [4]
        assert small.output(1) == alone(TEN, 2)

    def test_without_a_host_tier_a_swap_becomes_a_recompute_and_says_so(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        assert small.preempt(1, Recovery.SWAP) == (Recovery.RECOMPUTE, 3, 0)

    def test_without_room_in_the_host_tier_a_swap_becomes_a_recompute_and_says_so(self):
        small = swapping(num_host_slots=5)
        small.start(request(1, TEN), request(2, range(30, 40)))
        assert small.preempt(1, Recovery.SWAP)[0] is Recovery.SWAP
        small.step()
        assert small.memory.host.num_held == 3
        # Three more would have to be held, and two slots are left.
        assert small.preempt(2, Recovery.SWAP)[0] is Recovery.RECOMPUTE
        assert small.memory.host.num_held == 3

    def test_what_is_held_for_a_sequence_is_never_dropped_for_others(self):
        small = swapping(num_host_slots=3, num_blocks=3)
        small.start(request(1, TEN))
        small.preempt(1, Recovery.SWAP)
        small.cache(range(30, 41), range(50, 61))
        assert small.memory.host.num_held == 3
        small.resume(1)
        assert small.resume(1).first_positions == [10] or small.memory.host.num_held == 3

    def test_a_cancelled_sequence_leaves_nothing_held(self):
        small = swapping()
        small.start(request(1, TEN))
        small.preempt(1, Recovery.SWAP)
        small.step()
        small.engine.cancel([1])
        # The two full blocks may serve others, the last one is of no use to anybody.
        assert (small.memory.host.num_held, small.memory.host.num_used) == (0, 2)
        assert small.engine.is_idle

    def test_the_step_says_how_each_victim_gave_way(self):
        small = swapping(num_blocks=4)
        small.start(request(1, EIGHT), request(2, range(30, 38)))
        result = small.step(victims=offered((1, Recovery.SWAP, 0)))
        assert (result.preempted_ids, result.preempted_recoveries) == ([1], [Recovery.SWAP])
        assert (result.preempted_num_blocks, result.preempted_num_computed) == ([2], [0])
        assert result.preempted_generations == [1]
        assert result.account.host_used == result.account.host_total - 6 == 2

    def test_a_sequence_that_fills_the_pool_comes_back(self):
        """A swap that needs more room to return than the sequence ever held is a life sentence."""
        small = swapping(num_blocks=3)
        small.start(request(1, TEN))
        small.preempt(1, Recovery.SWAP)
        small.step()
        for _ in range(4):
            result = small.resume(1)
            if not result.refused_ids:
                break
        assert result.refused_ids == []
        assert small.output(1) == alone(TEN, 2)

    def test_a_partly_filled_block_of_another_epoch_is_never_found(self):
        """Sequence ids come again after a takeover, and with them the keys made from them."""
        small = swapping(num_blocks=4)
        for prompt in (SIX, list(range(50, 56))):
            small.start(request(1, prompt))
            small.preempt(1, Recovery.SWAP)
            small.step()
            # Others push everything of it off the device.
            small.start(request(2, range(30, 44)))
            small.engine.cancel([2])
            while small.memory.sequences.get(1).row < 0:
                small.resume(1)
            assert small.output(1)[-2:] == alone(prompt, 2)
            small.engine.reset()


class TestTail:
    def test_only_the_last_blocks_go_and_the_row_stays(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        small.sink.records.clear()
        assert small.preempt(1, Recovery.TAIL, 1) == (Recovery.TAIL, 1, 8)
        assert small.table(1) == [0, 1]
        assert small.num_computed(1) == 8
        assert small.sink.brief() == [("RELEASE", "TAIL", (2,)), ("FREE", "TAIL", (2,))]
        small.check()

    def test_it_is_a_preemption_with_a_new_generation_in_both_places(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        small.preempt(1, Recovery.TAIL, 1)
        sequence = small.memory.sequences.get(1)
        assert (sequence.generation, sequence.num_preemptions) == (1, 1)
        assert int(small.memory.sequences.generations[sequence.row]) == 1
        assert sequence.state is SequenceState.RUNNING
        assert small.step(must=entries((1, 0, 9))).stale_ids == [1]

    def test_the_sequence_catches_up_and_goes_on_with_the_same_tokens(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        small.step()
        small.preempt(1, Recovery.TAIL, 2)
        assert (small.table(1), small.num_computed(1)) == ([0], 4)
        # It lacks more than one token, so it runs only when it is named.
        assert small.step().sampled_ids == []
        assert small.step(must=entries((1, 1, 64))).first_positions == [4]
        small.step()
        assert small.output(1) == alone(TEN, 4)

    def test_what_it_publishes_again_is_found_only_once(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        small.preempt(1, Recovery.TAIL, 2)
        assert small.cached_ids() == [1]
        small.sink.records.clear()
        small.step(must=entries((1, 1, 64)))
        # Block 1 has the content still; the new one is not entered beside it.
        assert [it for it in small.sink.brief() if it[0] == "INDEX"] == []
        assert small.cached_ids() == [1]

    def test_what_is_gone_from_the_index_is_published_again(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        small.preempt(1, Recovery.TAIL, 2)
        assert small.memory.pool.evict(1, Purpose(KvCause.POOL_PRESSURE)) == 1
        small.sink.records.clear()
        small.step(must=entries((1, 1, 64)))
        assert [it for it in small.sink.brief() if it[0] == "INDEX"] == [
            ("INDEX", "SEALED", (small.table(1)[1],))
        ]

    @pytest.mark.parametrize("num_blocks", [0, 3, 4])
    def test_a_tail_that_is_no_shorter_than_the_whole_is_a_recompute(self, num_blocks):
        small = SmallEngine()
        small.start(request(1, TEN))
        assert small.preempt(1, Recovery.TAIL, num_blocks) == (Recovery.RECOMPUTE, 3, 0)

    def test_a_shared_tail_is_released_and_stays_with_the_others(self):
        small = SmallEngine()
        small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
        small.preempt(1, Recovery.TAIL, 1)
        assert (small.table(1), small.table(2)) == ([0, 1], [0, 1, 2])
        assert small.memory.pool.columns.ref_counts[:3].tolist() == [2, 2, 1]
        small.step(must=entries((1, 1, 64)))
        assert small.output(1) == alone(TEN, 2)

    def test_a_victim_by_tail_makes_room_for_the_others_and_does_not_run_in_that_step(self):
        small = SmallEngine(num_blocks=5)
        small.start(request(1, EIGHT), request(2, [*range(30, 38), 38]))
        # 1 needs a third block. 2 gives up its last one, and 8 of its tokens stay computed.
        result = small.step(victims=offered((2, Recovery.TAIL, 1)), must=entries((2, 0, 3)))
        assert result.preempted_recoveries == [Recovery.TAIL]
        assert (result.preempted_num_blocks, result.preempted_num_computed) == ([1], [8])
        assert (result.sampled_ids, small.table(1)[:2]) == ([1], [0, 1])
        assert small.step(must=entries((2, 1, 1))).refusal == "MUST_DOES_NOT_FIT"

    def test_more_than_one_tail_is_taken_until_it_fits(self):
        small = SmallEngine(num_blocks=6)
        small.start(request(1, EIGHT), request(2, range(30, 34)), request(3, range(50, 60)))
        chosen = offered((3, Recovery.TAIL, 1), (3, Recovery.TAIL, 2), (2, Recovery.TAIL, 1))
        result = small.step(victims=chosen)
        # Two blocks are lacking. Of 3 the first entry counts, and 2 has no tail but all it has.
        assert result.preempted_ids == [3, 2]
        assert result.preempted_recoveries == [Recovery.TAIL, Recovery.RECOMPUTE]
        assert result.sampled_ids == [1]

    def test_the_account_remembers_the_peak(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        small.preempt(1, Recovery.TAIL, 2)
        account = small.engine.cancel([1]).accounts[1]
        assert (account.num_blocks_peak, account.num_preemptions) == (3, 1)


class TestWindow:
    def test_blocks_that_no_later_token_sees_are_given_up(self):
        small = SmallEngine(window_tokens=6)
        small.start(request(1, TEN))
        # The next token stands at 10 and sees [5, 10]: block 0 is behind.
        assert (small.first_block(1), small.table(1)) == (1, [1, 2])
        assert small.sink.brief()[-1:] == [("RELEASE", "WINDOW", (0,))]
        assert small.cached_ids() == [0]

    def test_a_block_stays_as_long_as_its_last_token_is_seen(self):
        small = SmallEngine(window_tokens=6)
        small.start(request(1, SIX))
        for num_computed, first_block in ((7, 0), (8, 0), (9, 1), (10, 1)):
            small.step()
            assert (small.num_computed(1), small.first_block(1)) == (num_computed, first_block)

    def test_all_blocks_are_released_once_when_it_ends(self):
        small = SmallEngine(window_tokens=6, has_prefix_cache=False)
        small.start(request(1, TEN))
        small.step()
        small.engine.cancel([1])
        assert small.engine.account() == PoolAccount(total=8, free=8)
        assert small.first_block(1) if small.memory.sequences.get(1) else True

    def test_a_fork_begins_where_its_parent_does(self):
        small = SmallEngine(window_tokens=6)
        small.start(request(1, TEN))
        small.step(forks=[fork(1, 2)])
        assert (small.first_block(2), small.table(2)) == (1, small.table(1))
        for _ in range(4):
            small.step()
        assert small.first_block(1) == small.first_block(2) == 2
        small.engine.cancel([1, 2])
        assert small.engine.account().held == 0

    def test_a_row_begins_anew_after_one_that_had_left_blocks_behind(self):
        small = SmallEngine(window_tokens=6, num_rows=1)
        small.start(request(1, TEN))
        small.engine.cancel([1])
        small.start(request(2, [30, 31, 32]))
        assert (small.first_block(2), len(small.table(2))) == (0, 1)

    def test_a_prompt_sent_again_finds_what_left_the_window(self):
        small = SmallEngine(window_tokens=6)
        small.cache(TEN)
        result = small.start(request(1, TEN))
        assert result.first_positions == [8]
        assert small.first_block(1) == 1

    def test_a_swap_brings_back_what_the_window_still_sees(self):
        small = swapping(window_tokens=6)
        small.start(request(1, TEN))
        # Of three blocks the first has left the window.
        assert small.preempt(1, Recovery.SWAP) == (Recovery.SWAP, 2, 0)
        assert small.memory.host.num_held == 2
        small.step()
        small.memory.pool.evict(8, Purpose(KvCause.POOL_PRESSURE))
        assert small.resume(1).refused_because == [RefusedBecause.PROMOTING]
        result = small.resume(1)
        assert (result.first_positions, result.num_computed) == ([10], [11])
        assert (small.first_block(1), len(small.table(1))) == (1, 2)

    def test_a_tail_is_given_up_only_as_far_as_the_window_reaches_back(self):
        """What is computed again sees tokens that were behind the window already."""
        small = SmallEngine(window_tokens=8, num_blocks=12)
        small.start(request(1, range(10, 26)))
        assert (small.first_block(1), small.num_computed(1)) == (2, 16)
        small.preempt(1, Recovery.TAIL, 1)
        sequence = small.memory.sequences.get(1)
        if sequence.row >= 0:
            first_seen = small.num_computed(1) - 8 + 1
            assert small.first_block(1) * 4 <= first_seen

    def test_preemption_after_blocks_left_the_window_starts_over(self):
        small = SmallEngine(window_tokens=6, has_prefix_cache=False)
        small.start(request(1, TEN))
        assert small.preempt(1, Recovery.RECOMPUTE) == (Recovery.RECOMPUTE, 2, 0)
        result = small.resume(1)
        assert (result.first_positions, result.num_computed) == ([0], [11])
