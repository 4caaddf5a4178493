"""The fake is honest about blocks: shared ones count once, and a write into one takes another."""

from pageframe.testing.fake_pool import FakePool


def test_a_write_takes_the_blocks_that_are_missing():
    pool = FakePool(block_size=4)
    pool.write(1, 0, 6, "a")
    assert (pool.num_blocks_of(1), pool.num_held) == (2, 2)
    pool.write(1, 6, 8, "a")
    assert pool.num_held == 2
    pool.write(1, 8, 9, "a")
    assert (pool.num_held, pool.num_held_by("a"), pool.num_held_by("b")) == (3, 3, 0)


def test_all_but_the_last_writer_of_a_shared_block_copy_it():
    pool = FakePool(block_size=4)
    pool.write(1, 0, 6, "a")
    for child_id in (2, 3):
        pool.share(1, child_id, 2)
    assert pool.num_held == 2
    for sequence_id in (2, 1, 3):
        pool.write(sequence_id, 6, 7, "a")
    assert pool.num_held == 4
    assert dict(pool.num_copied) == {2: 1, 1: 1}
    assert len({pool.tables[sequence_id][0] for sequence_id in (1, 2, 3)}) == 1
    assert len({pool.tables[sequence_id][1] for sequence_id in (1, 2, 3)}) == 3


def test_a_copy_of_the_pool_tries_things_out_without_a_trace():
    pool = FakePool(block_size=4)
    pool.write(1, 0, 8)
    trial = pool.copy()
    trial.cut(1, 1)
    trial.write(2, 0, 12)
    trial.drop(1)
    assert (pool.num_held, trial.num_held) == (2, 3)
    # Numbers are never given out twice, in whichever of the two.
    pool.write(3, 0, 4)
    assert not set(pool.tables[3]) & set(trial.tables[2])
