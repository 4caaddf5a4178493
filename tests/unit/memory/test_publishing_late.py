"""Full blocks are published before anybody misses them; if nobody does, while a step computes."""

import pytest

from pageframe.core.plan import Recovery, Victims
from pageframe.core.replica import PoolAccount
from pageframe.executor.memory.retaining import SessionTimes
from unit.executor.small_engine import ONE_TOKEN, SmallEngine, fork, request
from unit.memory.memories import entries

TEN = range(10, 20)
SEALED = ("INDEX", "SEALED", (0, 1))


@pytest.fixture
def small() -> SmallEngine:
    """One sequence of three blocks, two of them full and not published yet."""
    small = SmallEngine(is_prompt=False)
    small.start(request(1, TEN))
    assert num_found(small) == 0
    return small


def num_found(small: SmallEngine) -> int:
    return len(small.memory.pool.index)


def indexed(small: SmallEngine) -> list[tuple[str, str, tuple[int, ...]]]:
    return [it for it in small.sink.brief() if it[0] == "INDEX"]


def test_a_runner_may_have_it_done_while_its_device_computes(small):
    seen = []
    execute = small.runner.execute

    def execute_and_wait(batch):
        seen.append(num_found(small))
        batch.meanwhile()
        seen.append(num_found(small))
        return execute(batch)

    small.runner.execute = execute_and_wait
    small.step()
    assert seen == [0, 2]
    assert indexed(small) == [SEALED]


def test_of_a_runner_that_does_not_ask_it_is_done_behind_the_step(small):
    seen = []
    execute = small.runner.execute
    small.runner.execute = lambda batch: seen.append(num_found(small)) or execute(batch)
    small.step()
    assert (seen, num_found(small)) == ([0], 2)
    assert [(it.operation.name, it.step, it.position) for it in small.sink.records] == [
        ("ALLOCATE", 1, 0),
        ("INDEX", 2, 10),
    ]


def test_what_the_next_step_fills_waits_for_the_one_behind_it(small):
    small.step()
    small.step()
    assert (small.num_computed(1), num_found(small)) == (12, 2)
    small.step()
    assert indexed(small) == [SEALED, ("INDEX", "SEALED", (2,))]


def test_an_admission_finds_what_the_step_before_has_filled(small):
    result = small.start(request(2, TEN))
    assert (result.first_positions, result.num_cached_tokens) == ([8], [8])
    assert small.table(2)[:2] == small.table(1)[:2] == [0, 1]


def test_an_announcement_is_told_of_it(small):
    assert small.step(announce=[request(2, TEN)]).num_cached_tokens == [8]


def test_the_blocks_of_who_ends_in_a_plan_stay_findable(small):
    small.step(finish=[1])
    assert small.cached_ids() == [1, 0]


def test_the_blocks_of_who_is_cancelled_stay_findable(small):
    assert small.engine.cancel([1]).account == PoolAccount(total=8, free=6, cached=2)


def test_the_blocks_of_who_ends_with_its_token_stay_findable():
    small = SmallEngine(is_prompt=False)
    small.start(request(1, TEN, sampling=ONE_TOKEN))
    assert small.cached_ids() == [1, 0]


def test_the_blocks_of_a_victim_stay_findable():
    small = SmallEngine(num_blocks=4, is_prompt=False)
    small.start(request(1, TEN), request(2, range(40, 44)))
    assert num_found(small) == 0
    victims = Victims()
    victims.add(1, 0, Recovery.RECOMPUTE, 0, 0)
    assert small.step(victims=victims).preempted_ids == [1]
    assert small.cached_ids() == [1, 0]


def test_the_blocks_of_all_stay_findable_for_another_scheduler(small):
    small.engine.reset()
    assert small.cached_ids() == [1, 0]


def test_a_chat_keeps_what_its_last_step_has_filled():
    small = SmallEngine(is_prompt=False, session_times=SessionTimes(idle_ns=0, ttl_ns=100))
    small.start(request(1, TEN, sampling=ONE_TOKEN, session_id="chat"))
    assert small.engine.account().pinned == 2


def test_a_handle_keeps_what_the_step_before_has_filled(small):
    facts = small.desk.retain(
        tenant="", cache_salt=b"", name="x", token_ids=list(TEN), ttl_ns=100, now_ns=1
    )
    assert (facts.num_tokens, small.engine.account().pinned) == (8, 2)


def test_a_look_at_the_pool_shows_it(small):
    assert small.desk.snapshot().is_indexed[:3].tolist() == [True, True, False]
    assert small.desk.explain(1).is_indexed


def test_a_failed_step_takes_nothing_with_it_that_was_filled_before(small):
    small.step()
    small.runner.fail_next = True
    small.step()
    assert small.cached_ids() == [1, 0]
    assert indexed(small) == [SEALED]


def test_a_parent_publishes_what_its_child_has_as_well(small):
    small.step(forks=[fork(1, 2)])
    small.step()
    small.step()
    small.step(must=entries())
    by_sequence = [
        (it.sequence_id, it.block_ids) for it in small.sink.records if it.operation.name == "INDEX"
    ]
    # From the third block on each has its own; the parent, who writes first, has a copy.
    assert by_sequence == [(1, (0, 1)), (1, (3,)), (2, (2,))]


def test_a_window_gives_up_nothing_that_was_not_published():
    small = SmallEngine(is_prompt=False, window_tokens=4)
    small.start(request(1, TEN))
    assert num_found(small) == 2
