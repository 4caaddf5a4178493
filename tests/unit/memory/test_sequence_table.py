import numpy as np
import pytest

from pageframe.core.sampling import SamplingParams
from pageframe.executor.memory.block_table import BlockTables
from pageframe.executor.memory.key_chain import KeyChain
from pageframe.executor.memory.sequence_table import (
    NO_ROW,
    Sequence,
    SequenceState,
    SequenceTable,
)


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def new_sequence(sequence_id: int, num_tokens: int = 3) -> Sequence:
    return Sequence(
        sequence_id=sequence_id,
        generation=0,
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(),
        sample_index=0,
        parked_tokens=np.arange(num_tokens, dtype=np.int32) + 100 * sequence_id,
        keys=KeyChain(bytes(32)),
    )


@pytest.fixture
def table() -> SequenceTable:
    table = SequenceTable(num_rows=3, max_model_len=1000)
    for sequence_id in (1, 2, 3):
        table.add(new_sequence(sequence_id))
    return table


def test_a_seated_sequence_brings_its_tokens_and_has_nothing_computed(table):
    sequence = table.get(2)
    table.seat(sequence)
    assert (sequence.row, sequence.state) == (0, SequenceState.RUNNING)
    assert len(sequence.parked_tokens) == 0
    assert table.tokens_of(0).tolist() == [200, 201, 202]
    assert table.num_computed[0] == 0
    assert table.at_row(0) is sequence


def test_an_unseated_sequence_takes_its_tokens_along(table):
    sequence = table.get(2)
    table.seat(sequence)
    table.append_tokens(ids(0), ids(9))
    table.unseat(sequence)
    assert sequence.parked_tokens.tolist() == [200, 201, 202, 9]
    assert (sequence.row, sequence.state) == (NO_ROW, SequenceState.PREEMPTED)
    assert table.running_rows().tolist() == []


def test_rows_are_listed_in_join_order_whatever_row_was_free(table):
    first, second, third = table.all()
    table.seat(first)
    table.seat(second)
    table.unseat(first)
    table.seat(third)
    assert table.running_rows().tolist() == [1, 0]
    table.seat(first)
    assert table.running_rows().tolist() == [1, 0, 2]
    assert not table.has_empty_row


def test_caught_up_means_that_only_the_newest_token_is_not_computed(table):
    for sequence in table.all():
        table.seat(sequence)
    table.num_computed[:] = [1, 2, 0]
    assert table.caught_up_rows().tolist() == [1]
    table.append_tokens(ids(1), ids(9))
    assert table.caught_up_rows().tolist() == []


def test_token_buffer_grows_past_its_first_capacity_and_keeps_all_rows(table):
    for sequence in table.all():
        table.seat(sequence)
    for token_id in range(600):
        table.append_tokens(ids(0), ids(token_id))
    assert table.tokens_of(0).tolist() == [100, 101, 102, *range(600)]
    assert table.tokens_of(2).tolist() == [300, 301, 302]
    assert table.tokens.shape[1] <= 1000


def test_more_tokens_than_the_model_takes_is_our_bug(table):
    table.add(new_sequence(4, num_tokens=1001))
    with pytest.raises(AssertionError, match="1001 tokens of 1000"):
        table.seat(table.get(4))


def test_only_rows_whose_last_block_is_full_stand_at_a_boundary():
    tables = BlockTables(num_rows=3, max_model_len=16, block_size=4)
    for row in range(3):
        tables.append(row, ids(row))
    num_computed = ids(3, 4, 0)
    assert tables.rows_at_boundary(ids(2, 1, 0), num_computed).tolist() == [1]
    tables.append_each(ids(1), ids(9))
    assert tables.blocks_of(1).tolist() == [1, 9]
    assert tables.rows_at_boundary(ids(0, 1, 2), num_computed).tolist() == []


def test_missing_blocks_are_counted_from_what_a_row_has():
    tables = BlockTables(num_rows=1, max_model_len=16, block_size=4)
    assert [tables.num_missing(0, n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    tables.append(0, ids(6, 7))
    assert [tables.num_missing(0, n) for n in (1, 8, 9, 16)] == [0, 0, 1, 2]
    assert tables.clear(0).tolist() == [6, 7]
    assert tables.num_blocks.tolist() == [0]


def test_a_row_longer_than_the_model_takes_is_our_bug():
    tables = BlockTables(num_rows=1, max_model_len=8, block_size=4)
    with pytest.raises(AssertionError, match="3 blocks in a row of 2"):
        tables.append(0, ids(1, 2, 3))
