"""Where the last tokens stood before: against a search that looks at everything."""

import numpy as np
import pytest

from pageframe.core.sampling import SamplingParams
from pageframe.executor.memory.key_chain import KeyChain
from pageframe.executor.memory.sequence_table import Sequence, SequenceTable
from pageframe.executor.ngrams import NGRAM_SIZES, NgramIndex


def make_sequence(sequence_id: int, token_ids) -> Sequence:
    return Sequence(
        sequence_id=sequence_id,
        generation=0,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(),
        sample_index=0,
        parked_tokens=np.array(token_ids, dtype=np.int32),
        keys=KeyChain(b""),
    )


def make_table(*texts, max_model_len: int = 512) -> SequenceTable:
    table = SequenceTable(len(texts), max_model_len)
    for sequence_id, text in enumerate(texts, start=1):
        sequence = make_sequence(sequence_id, text)
        table.add(sequence)
        table.seat(sequence)
    return table


def look(index: NgramIndex, table: SequenceTable, *rows: int) -> list[tuple[int, int]]:
    """Place and size of the n-gram for each of ``rows``; (0, 0) for none."""
    array = np.array(rows or range(table.num_rows), dtype=np.int32)
    index.enter(table, array)
    found, which = index.find(table, array)
    sizes = [NGRAM_SIZES[by] if place else 0 for place, by in zip(found, which, strict=True)]
    return list(zip(found.tolist(), sizes, strict=True))


def append(table: SequenceTable, row: int, token_id: int) -> None:
    table.append_tokens(np.array([row], dtype=np.int32), np.array([token_id], dtype=np.int32))


def searched(text: list[int]) -> tuple[int, int]:
    """The same by looking at all of it: the longest n-gram, the latest place."""
    for size in reversed(NGRAM_SIZES):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                return end, size
    return 0, 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 9, 1, 2], (2, 2)),
        ([1, 2, 3, 9, 1, 2, 3], (3, 3)),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], (4, 4)),
        # The longer one counts, though the shorter stood later.
        ([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], (3, 3)),
        # Of two places the later one.
        ([1, 2, 7, 1, 2, 8, 1, 2], (5, 2)),
        # It may reach into itself.
        ([5, 5, 5, 5, 5, 5], (5, 4)),
        ([1, 2, 3, 4, 5], (0, 0)),
        ([1, 1], (0, 0)),
        ([1], (0, 0)),
    ],
)
def test_places(text, expected):
    table = make_table(text)
    assert look(NgramIndex(1, 512), table) == [expected]
    assert searched(text) == expected


@pytest.mark.parametrize("seed", range(5))
def test_tokens_that_come_one_by_one_or_many_at_once(seed):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 6, rng.integers(1, 30)).tolist() for _ in range(8)]
    table = make_table(*texts)
    # Many places, so that hardly two n-grams fall on one.
    index = NgramIndex(8, 1 << 20)
    for _ in range(40):
        assert look(index, table) == [searched(text) for text in texts]
        for row, text in enumerate(texts):
            for _ in range(rng.integers(0, 4)):
                text.append(int(rng.integers(0, 6)))
                append(table, row, text[-1])


def test_rows_of_which_some_are_left_out_catch_up():
    texts = [[1, 2, 9], [3, 4, 9]]
    table = make_table(*texts)
    index = NgramIndex(2, 512)
    for token_id in (1, 2):
        look(index, table, 0)
        append(table, 0, token_id)
        append(table, 1, token_id + 2)
    assert look(index, table, 0, 1) == [(2, 2), (2, 2)]


def test_what_another_sequence_left_in_a_row_is_never_taken_for_its_own():
    table = make_table([1, 2, 3, 4, 5, 6, 7, 8])
    index = NgramIndex(1, 512)
    look(index, table)
    table.unseat(table.by_id(1))
    table.remove(table.by_id(1))
    # The old text stands behind the new one in the row; its places are still in the index.
    text = [9, 9, 2, 3]
    table.add(make_sequence(2, text))
    table.seat(table.by_id(2))
    index.begin(np.array([0], dtype=np.int32))
    assert look(index, table) == [(0, 0)]
    append(table, 0, 4)
    assert look(index, table) == [(0, 0)]


def test_n_grams_that_fall_on_one_hash_name_no_wrong_place():
    # Room for four places only.
    table = make_table(list(range(40)), [1, 2] * 20)
    index = NgramIndex(2, 3)
    for _ in range(30):
        for row, (place, size) in enumerate(look(index, table)):
            text = table.tokens_of(row).tolist()
            assert not size or text[place - size : place] == text[-size:]
            append(table, row, (len(text) * 7) % 40 if row == 0 else text[-2])
    assert look(index, table)[1][1] == 4
