"""From an applied step to the flat arrays that a runner computes."""

import numpy as np

from pageframe.core.plan import Fork
from pageframe.executor.batch import StepBatch
from pageframe.executor.batch_builder import BatchBuilder
from unit.executor.small_engine import fork
from unit.memory.memories import Harness, announcement, entries


class Builder(Harness):
    """Applies plans, and builds the batch of each before it is computed."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.builder = BatchBuilder(
            self.memory.tables, self.memory.sequences, max_step_tokens=self.bounds.max_step_tokens
        )

    def build(self, **changes) -> StepBatch:
        return self.builder.build(self.apply(**changes))


def test_a_prompt_is_one_span_from_its_first_token():
    batch = Builder().build(announce=[announcement(1, 6)], may=entries((1, 0, 6)))
    assert (batch.step, batch.num_decodes, batch.rows.tolist()) == (1, 0, [0])
    assert batch.token_ids.tolist() == [10, 11, 12, 13, 14, 15]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.slots.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.query_start.tolist() == [0, 6]
    assert batch.context_lens.tolist() == [6]
    assert batch.block_tables[:, :2].tolist() == [[0, 1]]
    assert (batch.samples.tolist(), batch.sample_rows.tolist()) == ([0], [0])


def test_spans_stand_end_to_end_decodes_first():
    house = Builder()
    house.run(announce=[announcement(1, 6), announcement(2, 9)], may=entries((1, 0, 6), (2, 0, 4)))
    batch = house.build(
        must=entries((2, 0, 3)), announce=[announcement(3, 2)], may=entries((3, 0, 2))
    )
    # 1 decodes at position 6, 2 goes on from 4, 3 begins.
    assert batch.num_decodes == 1
    assert batch.query_start.tolist() == [0, 1, 4, 6]
    assert batch.positions.tolist() == [6, 4, 5, 6, 0, 1]
    assert batch.token_ids.tolist() == [5, 24, 25, 26, 30, 31]
    assert batch.context_lens.tolist() == [7, 7, 2]
    tables = [[0, 1], [2, 3], [4]]
    assert [batch.block_tables[k, : len(it)].tolist() for k, it in enumerate(tables)] == tables
    assert batch.slots.tolist() == [6, 12, 13, 14, 16, 17]
    # 2 has two tokens left, so it does not sample.
    assert (batch.samples.tolist(), batch.sample_rows.tolist()) == ([0, 2], [0, 2])


def test_a_hit_begins_behind_what_is_shared_and_a_copy_is_written_where_it_is():
    house = Builder(has_prefix_cache=True)
    house.run(announce=[announcement(1, 8)], may=entries((1, 0, 8)))
    house.run(finish=[1])
    batch = house.build(announce=[announcement(1, 8)], may=entries((1, 0, 8)))
    assert (batch.positions.tolist(), batch.token_ids.tolist()) == ([7], [17])
    assert batch.block_tables[:, :2].tolist() == [[0, 2]]
    assert batch.slots.tolist() == [2 * 4 + 3]
    assert (batch.num_decodes, batch.samples.tolist()) == (0, [0])


def test_children_sample_from_the_logits_of_their_parent_with_rows_of_their_own():
    house = Builder()
    house.run(announce=[announcement(1, 6), announcement(2, 2)], may=entries((1, 0, 6), (2, 0, 2)))
    batch = house.build(forks=[fork(2, 3), fork(1, 4)])
    assert batch.rows.tolist() == [0, 1]
    assert batch.samples.tolist() == [0, 1, 1, 0]
    assert batch.sample_rows.tolist() == [0, 1, 2, 3]


def test_a_child_of_a_prompt_that_ends_in_this_step_samples_with_it():
    house = Builder()
    batch = house.build(
        announce=[announcement(1, 6)],
        may=entries((1, 0, 6)),
        forks=[Fork(parent_id=1, generation=0, child_ids=[2], sample_indices=[1], span_ids=[0])],
    )
    assert (batch.num_decodes, batch.samples.tolist()) == (0, [0, 0])
    assert batch.sample_rows.tolist() == [0, 1]


def test_nothing_to_do_is_an_empty_batch():
    batch = Builder().build(announce=[announcement(1)])
    assert len(batch.rows) == len(batch.token_ids) == len(batch.samples) == 0
    assert batch.query_start.tolist() == [0]


def test_tokens_behind_a_window_have_no_block_and_those_before_it_have_theirs():
    house = Builder(window_tokens=6)
    house.run(announce=[announcement(1, 10)], may=entries((1, 0, 10)))
    batch = house.build()
    assert batch.block_tables[0, 1:3].tolist() == [1, 2]
    assert batch.slots.tolist() == [2 * 4 + 2]


def test_slots_reach_beyond_32_bits():
    house = Builder()
    applied = house.apply(announce=[announcement(1, 3)], may=entries((1, 0, 3)))
    # A block that a pool of this size has only on paper.
    house.memory.tables.entries[house.row(1), 0] = 2**30
    batch = house.builder.build(applied)
    assert batch.slots.tolist() == [2**32, 2**32 + 1, 2**32 + 2]


def test_the_arrays_are_views_into_buffers_of_the_builder():
    house = Builder()
    first = house.build(announce=[announcement(1, 6)], may=entries((1, 0, 6)))
    kept = first.token_ids
    house.memory.sequences.num_computed[0] = 6
    house.memory.sequences.append_tokens(np.array([0]), np.array([77], dtype=np.int32))
    second = house.build()
    assert np.shares_memory(kept, second.token_ids)
    assert second.token_ids.tolist() == [77]
