"""What is guessed, how likely it is right, and how much of it is worth computing."""

import numpy as np
import pytest

from pageframe.core.plan import DraftBounds
from pageframe.core.step import FinishReason
from pageframe.executor.batch import DraftSamples, StepBatch, StepOutput
from pageframe.executor.drafting import NgramDrafter, draft_lengths, without_rejected
from unit.executor.test_ngrams import append, make_sequence, make_table

ROW_0 = np.array([0], dtype=np.int32)


def lengths(acceptance, *, most=99, num_tokens=99, each=8, acceptance_min=0.0):
    found = draft_lengths(
        np.array(acceptance, dtype=np.float64),
        np.full(len(acceptance), most, dtype=np.int32),
        DraftBounds(
            num_tokens=num_tokens,
            num_tokens_each=each,
            num_blocks=99,
            acceptance_min=acceptance_min,
        ),
    )
    return found.tolist()


class TestLengths:
    def test_each_token_has_to_be_worth_it(self):
        # 0.5 ** 2 is still enough, 0.5 ** 3 is not.
        assert lengths([0.5], acceptance_min=0.25) == [2]
        assert lengths([0.5], acceptance_min=0.26) == [1]
        assert lengths([0.5], acceptance_min=0.51) == [0]
        assert lengths([0.5], acceptance_min=1.0) == [0]
        assert lengths([0.999], acceptance_min=1.0) == [0]

    def test_where_tokens_are_free_all_are(self):
        assert lengths([0.01, 0.9], each=4) == [4, 4]

    def test_where_nothing_is_guessed_nothing_is_computed(self):
        assert lengths([0.0], acceptance_min=0.0) == [0]
        assert lengths([0.0], acceptance_min=0.5) == [0]

    def test_the_best_chances_come_first(self):
        assert lengths([0.5, 0.9, 0.7], num_tokens=6, each=4) == [0, 4, 2]

    def test_no_more_than_are_of_use(self):
        assert lengths([0.9], most=2) == [2]
        assert lengths([0.9], most=-1) == [0]


class TestGuesses:
    def test_what_followed_follows_again(self):
        drafter = NgramDrafter(1, 64)
        proposals = drafter.propose(make_table([1, 2, 3, 4, 9, 1, 2]), ROW_0, 3)
        assert proposals.token_ids.tolist() == [[3, 4, 9]]
        assert proposals.acceptance.tolist() == [0.5]

    def test_behind_the_newest_token_the_piece_begins_again(self):
        proposals = NgramDrafter(1, 64).propose(make_table([7, 1, 2, 7, 1, 2]), ROW_0, 5)
        assert proposals.token_ids.tolist() == [[7, 1, 2, 7, 1]]

    def test_new_text_has_no_chance(self):
        proposals = NgramDrafter(1, 64).propose(make_table([1, 2, 3]), ROW_0, 3)
        assert proposals.acceptance.tolist() == [0.0]

    def test_the_chance_is_learnt_by_watching(self):
        table, drafter = make_table([1, 2] * 4), NgramDrafter(1, 64)
        chances = []
        for step in range(20):
            chances.append(float(drafter.propose(table, ROW_0, 4).acceptance[0]))
            append(table, 0, 1 + step % 2)
        # Every guess was right, and none was computed.
        assert chances == sorted(chances)
        assert chances[0] == 0.5
        assert 0.85 < chances[-1] < 1

    def test_tokens_that_come_at_once_count_as_many_guesses(self):
        table, drafter = make_table([1, 2] * 4), NgramDrafter(1, 64)
        drafter.propose(table, ROW_0, 4)
        for token_id in (1, 2, 9):
            append(table, 0, token_id)
        drafter.propose(table, ROW_0, 4)
        # Before that one of two; then two more of three were right.
        assert drafter._kept[0, 2] == pytest.approx(0.9 + 2)
        assert drafter._tried[0, 2] == pytest.approx(1.8 + 3)

    def test_more_tokens_than_guesses_say_nothing_of_the_others(self):
        table, drafter = make_table([1, 2] * 4), NgramDrafter(1, 64)
        drafter.propose(table, ROW_0, 2)
        for token_id in (1, 2, 9, 9, 9):
            append(table, 0, token_id)
        drafter.propose(table, ROW_0, 2)
        assert (drafter._kept[0, 2], drafter._tried[0, 2]) == pytest.approx((2.9, 3.8))

    def test_no_token_no_lesson(self):
        table, drafter = make_table([1, 2] * 4), NgramDrafter(1, 64)
        for _ in range(5):
            assert drafter.propose(table, ROW_0, 2).acceptance.tolist() == [0.5]

    def test_another_sequence_in_the_row_is_a_stranger(self):
        table, drafter = make_table([1, 2] * 4), NgramDrafter(1, 64)
        for step in range(10):
            drafter.propose(table, ROW_0, 4)
            append(table, 0, 1 + step % 2)
        table.unseat(table.by_id(1))
        table.remove(table.by_id(1))
        table.add(make_sequence(2, [1, 2] * 4))
        table.seat(table.by_id(2))
        assert drafter.propose(table, ROW_0, 4).acceptance.tolist() == [0.5]

    def test_after_a_reset_the_same_id_is_a_stranger_too(self):
        table, drafter = make_table([1, 2] * 4), NgramDrafter(1, 64)
        drafter.propose(table, ROW_0, 4)
        append(table, 0, 1)
        drafter.reset()
        assert drafter.propose(table, ROW_0, 4).acceptance.tolist() == [0.5]

    def test_guesses_end_where_the_row_ends(self):
        table = make_table([1, 2] * 30, max_model_len=64)
        drafter = NgramDrafter(1, 64)
        for step in range(4):
            drafter.propose(table, ROW_0, 8)
            append(table, 0, 1 + step % 2)
        assert drafter.propose(table, ROW_0, 8).token_ids.tolist() == [[1, 2] * 4]


class NeverEnds:
    def reasons(self, rows, num_tokens, token_ids):
        return np.where(token_ids == 99, FinishReason.STOP, FinishReason.NONE)


def checked(num_behind, expected, sampled):
    """Two sequences of 10 and 20 known tokens, with two drafts each, and one without."""
    samples = np.array([0, 0, 0, 1, 1, 1, 2], dtype=np.int32)
    empty = np.zeros(0, dtype=np.int32)
    batch = StepBatch(
        step=1,
        num_decodes=0,
        rows=np.array([5, 6, 7], dtype=np.int32),
        token_ids=empty,
        positions=empty,
        slots=empty.astype(np.int64),
        query_start=np.array([0, 3, 6, 7], dtype=np.int32),
        context_lens=np.array([12, 22, 30], dtype=np.int32),
        block_tables=np.zeros((3, 1), dtype=np.int32),
        samples=samples,
        sample_rows=np.array([5, 5, 5, 6, 6, 6, 7], dtype=np.int32),
        drafts=DraftSamples(
            np.array(num_behind, dtype=np.int32), np.array(expected, dtype=np.int32)
        ),
    )
    output = StepOutput(
        token_ids=np.array(sampled, dtype=np.int32),
        logprobs={index: f"of {index}" for index in range(7)},
    )
    batch, output = without_rejected(batch, output, NeverEnds())
    return (
        output.token_ids.tolist(),
        batch.sample_positions.tolist(),
        batch.context_lens.tolist(),
        list(output.logprobs.values()),
    )


def test_samples_count_as_long_as_those_before_are_as_expected():
    tokens, positions, context_lens, logprobs = checked(
        [2, 1, 0, 2, 1, 0, 0], [1, 2, -1, 3, 4, -1, -1], [1, 7, 8, 3, 4, 5, 6]
    )
    assert tokens == [1, 7, 3, 4, 5, 6]
    assert positions == [10, 11, 20, 21, 22, 30]
    assert context_lens == [11, 22, 30]
    assert logprobs == ["of 0", "of 1", "of 3", "of 4", "of 5", "of 6"]


def test_nothing_counts_behind_the_end_of_a_sequence():
    tokens, positions, context_lens, _ = checked(
        [2, 1, 0, 2, 1, 0, 0], [99, 2, -1, 3, 99, -1, -1], [99, 2, 8, 3, 99, 5, 6]
    )
    assert (tokens, positions) == ([99, 3, 99, 6], [10, 20, 21, 30])
    assert context_lens == [10, 21, 30]
