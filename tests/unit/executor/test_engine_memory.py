"""The engine over shared memory: failures, takeovers, quarantine, and the account of it all."""

import numpy as np
import pytest

from pageframe.core.plan import Recovery
from pageframe.core.replica import PoolAccount
from pageframe.core.step import FinishReason, TokenLogprobs
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.block_columns import BlockState
from pageframe.executor.memory.integrity import ViolationKind
from pageframe.executor.memory.retaining import SessionTimes
from pageframe.executor.model.prompt_logprobs import PromptCollection
from unit.executor.small_engine import LONG, ONE_TOKEN, SmallEngine, alone, fork, request
from unit.memory.memories import entries

EIGHT = list(range(10, 18))
TEN = list(range(10, 20))


def retain(small: SmallEngine, token_ids, name: str = "h") -> None:
    small.desk.retain(
        tenant="t", cache_salt=b"", name=name, token_ids=token_ids, ttl_ns=900, now_ns=1
    )


def reasons(result) -> dict[int, int]:
    return dict(zip(result.sampled_ids, result.finish_reasons, strict=True))


class TestFailingSteps:
    def test_a_failed_step_ends_its_sequences_and_leaves_what_was_published_before(self):
        small = SmallEngine()
        small.start(request(1, TEN))
        small.runner.fail_next = True
        result = small.step(announce=[request(2, [*TEN, 30])], may=entries((2, 0, 64)))
        assert reasons(result) == {1: FinishReason.ERROR, 2: FinishReason.ERROR}
        assert small.engine.account() == PoolAccount(total=8, free=6, cached=2)
        assert small.start(request(3, TEN)).first_positions == [8]
        assert small.output(3) == alone(TEN, 1)

    def test_children_forked_in_a_failed_step_end_with_it(self):
        small = SmallEngine()
        small.runner.fail_next = True
        result = small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
        assert reasons(result) == {1: FinishReason.ERROR, 2: FinishReason.ERROR}
        assert small.engine.is_idle
        assert small.runner.rows == {}
        assert small.engine.account() == PoolAccount(total=8, free=8)

    def test_sequences_that_did_not_run_in_it_go_on(self):
        small = SmallEngine()
        small.step(announce=[request(1, TEN), request(2, [60, 61])], may=entries((1, 0, 3)))
        small.runner.fail_next = True
        small.step(may=entries((2, 0, 64)))
        assert small.memory.sequences.get(1) is not None
        small.step(must=entries((1, 0, 64)))
        assert small.output(1) == alone(TEN, 1)

    def test_a_failed_copy_on_write_spares_those_who_share(self):
        small = SmallEngine()
        small.start(request(1, EIGHT))
        small.preempt(1, Recovery.RECOMPUTE)
        small.runner.fail_next_move = True
        # The newcomer copies block 1; the copy fails, and 1 comes back to what is there.
        small.start(request(2, EIGHT))
        assert reasons(small.results[-1]) == {2: FinishReason.ERROR}
        small.resume(1)
        small.step()
        assert small.output(1) == alone(EIGHT, 3)

    def test_a_failed_admission_of_a_hit_gives_its_references_back(self):
        small = SmallEngine()
        small.cache(TEN)
        small.runner.fail_admit_of.add(5)
        result = small.start(request(1, TEN, sample_index=5))
        assert reasons(result) == {1: FinishReason.ERROR}
        assert small.engine.account() == PoolAccount(total=8, free=6, cached=2)

    def test_a_child_that_cannot_be_set_up_ends_alone(self):
        small = SmallEngine()
        small.runner.fail_admit_of.add(1)
        result = small.step(
            announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2, 3)]
        )
        assert reasons(result) == {
            1: FinishReason.NONE,
            2: FinishReason.ERROR,
            3: FinishReason.NONE,
        }
        assert small.memory.pool.columns.ref_counts[:3].tolist() == [2, 2, 2]
        small.step()
        assert small.output(3) == alone(TEN, 2, 2)


class TestPromptLogprobs:
    def test_a_prompt_whose_tail_was_given_up_is_told_once_and_whole(self):
        """It catches up again from where it was cut, and must not be told twice, nor fail."""
        collection = PromptCollection(np.arange(10, 20, dtype=np.int32))
        assert collection.wanted(0, 8) == (0, 8)
        collection.entries += [TokenLogprobs(token_id=11 + it, logprob=0.0) for it in range(8)]
        # Blocks of 4 tokens: the last one went, and 4 tokens stay computed.
        assert collection.wanted(4, 10) == (4, 9)
        collection.entries += [TokenLogprobs(token_id=15 + it, logprob=0.0) for it in range(5)]
        assert [entry.token_id for entry in collection.entries] == list(range(11, 20))


class TestTakeover:
    def test_the_index_survives_and_the_sequences_do_not(self):
        small = SmallEngine()
        small.start(request(1, TEN), request(2, [60, 61]))
        small.engine.reset()
        assert small.engine.is_idle
        assert small.engine.account() == PoolAccount(total=8, free=6, cached=2)
        assert small.start(request(1, TEN)).first_positions == [8]

    def test_the_host_tier_survives_and_holds_nothing_for_anybody(self):
        small = SmallEngine(num_blocks=4, num_host_slots=8)
        small.start(request(1, TEN))
        small.preempt(1, Recovery.SWAP)
        small.step()
        small.engine.reset()
        assert (small.memory.host.num_held, small.memory.host.num_used) == (0, 2)
        small.cache(range(40, 56))
        assert small.step(announce=[request(1, TEN)]).num_cached_tokens == [8]

    def test_handles_and_sessions_survive(self):
        small = SmallEngine(session_times=SessionTimes(idle_ns=0, ttl_ns=900))
        small.cache(TEN, session_id="chat")
        small.cache(range(40, 45))
        retain(small, list(range(40, 44)))
        small.engine.reset()
        assert small.engine.account() == PoolAccount(total=8, free=5, held=3, pinned=3, yieldable=2)
        assert small.engine.check_integrity() == []

    def test_leaders_of_the_last_epoch_lead_nobody(self):
        small = SmallEngine()
        small.step(announce=[request(1, TEN)])
        small.engine.reset()
        assert small.step(announce=[request(2, TEN)]).leader_ids == [0]

    def test_forks_end_with_their_parents(self):
        small = SmallEngine()
        small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2, 3)])
        small.engine.reset()
        assert small.runner.rows == {}
        assert small.engine.account() == PoolAccount(total=8, free=6, cached=2)


class TestQuarantine:
    def break_block(self, small: SmallEngine, block_id: int) -> list:
        small.memory.pool.columns.ref_counts[block_id] += 1
        return small.engine.check_integrity()

    def test_a_cached_block_is_lost_and_not_found_again(self):
        small = SmallEngine(is_checked=False)
        small.cache(TEN)
        kinds = {violation.kind for violation in self.break_block(small, 1)}
        assert kinds == {ViolationKind.REFERENCES, ViolationKind.STATE}
        assert small.engine.account() == PoolAccount(total=8, free=6, cached=1, quarantined=1)
        assert small.cached_ids() == [0]
        assert small.start(request(1, TEN)).first_positions == [4]
        assert small.engine.check_integrity() == []

    def test_an_indexed_block_ends_all_who_share_it_and_nobody_else(self):
        small = SmallEngine(is_checked=False)
        small.start(request(1, TEN))
        small.start(request(2, TEN), request(3, [60, 61]))
        self.break_block(small, 0)
        result = small.step()
        assert {it for it, why in reasons(result).items() if why == FinishReason.ERROR} == {1, 2}
        assert reasons(result)[3] == FinishReason.NONE
        assert small.engine.account().quarantined == 1
        assert small.engine.check_integrity() == []

    def test_a_pinned_block_is_kept_by_nobody_any_more(self):
        small = SmallEngine(is_checked=False)
        small.cache(TEN)
        retain(small, TEN)
        (violation, *_) = self.break_block(small, 0)
        assert violation.block.num_pins == 1
        assert small.engine.account() == PoolAccount(
            total=8, free=6, held=1, quarantined=1, pinned=1
        )
        assert small.engine.check_integrity() == []
        small.desk.release(tenant="t", name="h")
        assert small.engine.account() == PoolAccount(total=8, free=6, cached=1, quarantined=1)

    def test_the_content_of_a_lost_block_that_is_kept_by_name_is_pinned_anew(self):
        small = SmallEngine(is_checked=False)
        small.cache(TEN)
        retain(small, TEN)
        self.break_block(small, 0)
        small.start(request(1, TEN, sampling=ONE_TOKEN))
        assert small.engine.account().pinned == 2
        assert small.engine.check_integrity() == []

    def test_a_sequence_that_fills_its_lost_block_ends_and_the_server_does_not(self):
        """The leak check that ends the server: the cure is worse than the disease."""
        small = SmallEngine(is_checked=False)
        small.start(request(1, [10, 11, 12]), request(2, [60, 61]))
        self.break_block(small, small.table(1)[0])
        result = small.step()
        assert reasons(result) == {1: FinishReason.ERROR, 2: FinishReason.NONE}
        assert small.engine.check_integrity() == []

    def test_a_sequence_with_a_lost_block_has_no_children(self):
        small = SmallEngine(is_checked=False)
        small.start(request(1, TEN), request(2, [60, 61]))
        self.break_block(small, 2)
        result = small.step(forks=[fork(1, 3)])
        assert reasons(result)[1] == FinishReason.ERROR
        assert reasons(result)[2] == FinishReason.NONE
        assert small.memory.sequences.get(3) is None or reasons(result)[3] == FinishReason.ERROR
        assert small.engine.check_integrity() == []

    def test_a_broken_table_entry_costs_its_blocks_and_its_sequences(self):
        small = SmallEngine(is_checked=False)
        small.start(request(1, [10, 11]), request(2, [60, 61]), request(3, [70, 71]))
        small.memory.tables.entries[small.memory.sequences.get(1).row, 0] = small.table(2)[0]
        small.engine.check_integrity()
        result = small.engine.cancel([])
        assert {it for it, why in reasons(result).items() if why == FinishReason.ERROR} == {1, 2}
        assert small.memory.pool.columns.states[:2].tolist() == [BlockState.QUARANTINED] * 2
        assert reasons(small.step()) == {3: FinishReason.NONE}


class TestEngine:
    def test_a_promotion_alone_launches_a_step(self):
        small = SmallEngine(num_blocks=4, num_host_slots=8)
        small.cache(EIGHT, range(40, 56))
        launched = []
        small.engine.on_launch = lambda: launched.append(small.memory.last_applied_step)
        small.start(request(1, TEN))
        assert launched == [3]
        assert small.runner.batches[-1] != [10]

    def test_resuming_twice_computes_nothing_twice(self):
        small = SmallEngine(num_host_slots=8)
        small.start(request(1, TEN))
        for _ in range(3):
            small.preempt(1, Recovery.SWAP)
            while small.memory.sequences.get(1).row < 0:
                small.resume(1)
            assert small.runner.batches[-1] == [1]
        account = small.engine.cancel([1]).accounts[1]
        assert account.num_preemptions == 3

    def test_the_size_of_the_host_tier_is_told(self):
        small = SmallEngine(num_host_slots=5)
        assert small.engine.describe("r").num_host_blocks == 5
        assert small.engine.account().host_total == 5

    def test_log_probabilities_and_tokens_of_forks_stand_in_batch_order(self):
        small = SmallEngine()
        small.start(request(1, TEN), request(2, [60, 61]))
        result = small.step(forks=[fork(1, 3), fork(2, 4)])
        assert result.sampled_ids == [1, 2, 3, 4]
        assert result.token_ids == [
            small.output(1)[-1],
            small.output(2)[-1],
            alone(small.tokens(3)[:-1], 1, 1)[0],
            alone(small.tokens(4)[:-1], 1, 1)[0],
        ]

    def test_the_check_after_each_step_is_a_switch(self):
        for is_switched_on in (True, False):
            small = SmallEngine(is_checked=False, check_every_step=is_switched_on)
            small.start(request(1, TEN))
            small.memory.pool.columns.ref_counts[0] += 1
            assert small.step().account.quarantined == int(is_switched_on)

    @pytest.mark.parametrize("block_size", [1, 2, 16])
    def test_a_life_with_everything_in_it_ends_with_an_empty_pool(self, block_size):
        small = SmallEngine(block_size=block_size, num_blocks=40, num_host_slots=20)
        small.step(announce=[request(1, TEN)], may=entries((1, 0, 64)), forks=[fork(1, 2)])
        small.step()
        small.preempt(1, Recovery.SWAP)
        small.preempt(2, Recovery.TAIL, 1)
        while small.memory.sequences.get(1).row < 0:
            small.resume(1)
        small.step(must=entries((2, 1, 64)))
        assert small.output(1)[:3] == alone(TEN, 3)
        outputs = small.output(1), small.output(2)
        assert outputs == (alone(TEN, len(outputs[0])), alone(TEN, len(outputs[1]), 1))
        small.engine.cancel([1, 2])
        assert small.engine.account().held == 0
        assert isinstance(small.engine, StepEngine)
        assert np.count_nonzero(small.memory.pool.columns.ref_counts) == 0
        assert LONG.max_tokens == 40
