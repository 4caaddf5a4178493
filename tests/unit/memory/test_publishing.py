"""Full blocks enter the prefix index once the step that wrote them is over, and not before."""

from pageframe.core.replica import PoolAccount
from pageframe.executor.memory.block_keys import chain_keys, token_bytes
from pageframe.executor.memory.prefix_index import NO_BLOCK
from unit.executor.small_engine import SmallEngine, request
from unit.memory.memories import Harness, announcement, entries

TEN = range(10, 20)


def test_only_full_blocks_can_be_found():
    small = SmallEngine()
    small.start(request(1, TEN))
    assert small.sink.brief() == [
        ("ALLOCATE", "PREFILL", (0, 1, 2)),
        ("INDEX", "SEALED", (0, 1)),
    ]
    assert small.memory.pool.index.is_indexed[:3].tolist() == [True, True, False]


def test_each_block_is_found_under_the_key_of_everything_up_to_its_end():
    small = SmallEngine()
    small.start(request(1, TEN))
    tokens = small.memory.sequences.tokens_of(0)[:8]
    keys = chain_keys(small.memory.root_key(b""), tokens, 4)
    index = small.memory.pool.index
    assert [index.block_of(key) for key in keys] == [0, 1]
    assert index.block_before(1) == 0
    assert small.memory.pool.columns.depths[:2].tolist() == [0, 1]
    # As a child of the first block, by the tokens of the second.
    assert index.match_inside(keys[0], tokens[4:7]) == (1, 3)
    assert len(token_bytes(tokens)) == 32


def test_a_block_that_decoding_fills_is_published_by_the_step_that_fills_it():
    small = SmallEngine()
    small.start(request(1, TEN))
    small.sink.records.clear()
    small.step()
    assert small.sink.brief() == []
    small.step()
    (record,) = small.sink.records
    assert (record.operation.name, record.cause.name, record.block_ids) == ("INDEX", "SEALED", (2,))
    assert (record.sequence_id, record.step, record.position) == (1, 3, 12)


def test_each_chunk_of_a_prompt_publishes_what_it_has_filled():
    small = SmallEngine()
    small.step(announce=[request(1, TEN)], may=entries((1, 0, 3)))
    assert [it for it in small.sink.brief() if it[0] == "INDEX"] == []
    small.step(must=entries((1, 0, 6)))
    assert [it for it in small.sink.brief() if it[0] == "INDEX"] == [("INDEX", "SEALED", (0, 1))]
    small.step(must=entries((1, 0, 1)))
    assert small.sink.brief() == []


def test_an_admission_in_the_same_step_finds_nothing_of_what_that_step_computes():
    """Cached before it was written: a hit on such a block reads what is not there yet."""
    small = SmallEngine()
    result = small.step(
        announce=[request(1, TEN), request(2, TEN)], may=entries((1, 0, 64), (2, 0, 64))
    )
    assert (result.computed_ids, result.first_positions) == ([1, 2], [0, 0])
    assert [small.table(1), small.table(2)] == [[0, 1, 2], [3, 4, 5]]
    result = small.start(request(3, TEN))
    assert (result.first_positions, small.table(3)[:2]) == ([8], [0, 1])


def test_the_index_is_not_touched_while_a_plan_is_applied():
    harness = Harness(has_prefix_cache=True)
    harness.apply(announce=[announcement(1, 8)], may=entries((1, 0, 8)))
    assert len(harness.memory.pool.index) == 0
    assert {record.operation.name for record in harness.sink.records} == {"ALLOCATE"}


def test_of_two_that_computed_the_same_only_the_first_is_found():
    small = SmallEngine()
    small.step(announce=[request(1, TEN), request(2, TEN)], may=entries((1, 0, 64), (2, 0, 64)))
    assert [it for it in small.sink.brief() if it[0] == "INDEX"] == [("INDEX", "SEALED", (0, 1))]
    # So the second's blocks are free as soon as it ends, and nothing is cached twice.
    small.step(finish=[2])
    assert small.engine.account() == PoolAccount(total=8, free=5, held=3)
    small.step(finish=[1])
    assert small.cached_ids() == [1, 0]


def test_what_a_failed_step_has_written_is_not_published():
    small = SmallEngine()
    small.runner.fail_next = True
    small.start(request(1, TEN))
    assert small.engine.account() == PoolAccount(total=8, free=8)
    assert [it for it in small.sink.brief() if it[0] == "INDEX"] == []
    assert small.start(request(2, TEN)).first_positions == [0]


def test_without_a_prefix_cache_nothing_is_published():
    small = SmallEngine(has_prefix_cache=False)
    small.start(request(1, TEN))
    assert small.engine.cancel([1]).account == PoolAccount(total=8, free=8)
    assert small.start(request(2, TEN)).first_positions == [0]


def test_what_was_shared_is_not_offered_again():
    small = SmallEngine()
    small.cache(TEN)
    small.start(request(1, TEN))
    assert small.sink.brief() == [
        ("SHARE", "PREFIX_HIT", (0, 1)),
        ("ALLOCATE", "PREFILL", (2,)),
    ]


def test_a_copy_of_a_published_block_is_not_published_again():
    small = SmallEngine()
    small.cache(range(10, 18))
    small.start(request(1, range(10, 18)))
    assert small.table(1) == [0, 2]
    assert small.memory.pool.index.is_indexed[:3].tolist() == [True, True, False]


def test_blocks_that_left_the_window_are_passed_over():
    harness = Harness(has_prefix_cache=True, window_tokens=4, num_blocks=4)
    harness.run(announce=[announcement(1, 12)], may=entries((1, 0, 12)))
    row = harness.row(1)
    assert harness.memory.tables.first_block[row] == 2
    index = harness.memory.pool.index
    assert [int(it) for it in index.is_indexed.nonzero()[0]] == [0, 1, 2]
    harness.run()
    harness.run()
    assert harness.memory.sequences.num_published[row] == 3
    assert index.block_of(bytes(32)) == NO_BLOCK
