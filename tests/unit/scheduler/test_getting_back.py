"""What getting back is said to cost, by literal sequences in blocks of four tokens."""

import pytest

from pageframe.core.plan import Recovery
from pageframe.scheduler.getting_back import GettingBack
from pageframe.scheduler.sequence import Loss, Sequence
from pageframe.testing.fake_engine import make_facts
from unit.scheduler.driver import Driver, make_submission

TOKEN_NS = 1_000
BLOCK_NS = 100


class Prices:
    """As if they had been measured."""

    token_ns = TOKEN_NS
    block_ns = BLOCK_NS

    def __init__(self, moved_share: float, gone_share: float) -> None:
        self.moved_share = moved_share
        self.gone_share = gone_share


def sequence_of(num_computed: int, *, num_given: int = 0, num_reached: int = 0) -> Sequence:
    """One with so many tokens computed, that had ``num_reached`` before it lost some."""
    driver = Driver(facts=make_facts(num_blocks=32, block_size=4, num_host_blocks=8))
    driver.submit(make_submission(1, 40, max_tokens=4))
    sequence = driver.scheduler._roster.sequences[1]
    sequence.num_computed_known = num_computed
    sequence.num_given_tokens = num_given
    if num_reached:
        sequence.loss = Loss(
            start_ns=1,
            recovery=Recovery.TAIL,
            num_blocks=1,
            num_kept=num_computed,
            num_computed=num_reached,
            num_reached=num_reached,
            num_full_blocks=num_reached // 4,
            generation=0,
            beneficiary=None,
            estimate_ns=0,
        )
    return sequence


def back(moved_share: float, gone_share: float) -> GettingBack:
    driver = Driver(facts=make_facts(num_blocks=32, block_size=4, num_host_blocks=8))
    return GettingBack(driver.scheduler._roster, Prices(moved_share, gone_share))


@pytest.mark.parametrize(
    ("moved_share", "gone_share", "cost_ns"),
    [
        (0.0, 1.0, 22 * TOKEN_NS),
        (1.0, 0.0, 2 * TOKEN_NS + 5 * BLOCK_NS),
        (0.0, 0.0, 2 * TOKEN_NS),
        (0.4, 0.5, 12 * TOKEN_NS + 2 * BLOCK_NS),
    ],
)
def test_what_fills_no_block_is_computed_and_the_rest_as_it_is_found(
    moved_share, gone_share, cost_ns
):
    assert back(moved_share, gone_share).by_finding_ns(sequence_of(22)) == cost_ns


def test_what_others_gave_is_theirs_to_keep():
    sequence = sequence_of(22, num_given=8)
    assert back(0.0, 1.0).by_finding_ns(sequence) == 14 * TOKEN_NS
    assert back(1.0, 0.0).by_finding_ns(sequence) == 2 * TOKEN_NS + 3 * BLOCK_NS


def test_all_may_have_been_given():
    assert back(1.0, 1.0).by_finding_ns(sequence_of(8, num_given=10)) == 0


def test_what_it_found_of_its_own_counts_when_it_is_lost_again():
    sequence = sequence_of(22)
    sequence.num_shared_tokens = 20
    assert back(1.0, 0.0).by_finding_ns(sequence) == 2 * TOKEN_NS + 5 * BLOCK_NS


def test_a_swap_copies_each_block_both_ways_unless_the_host_has_it():
    sequence = sequence_of(22)
    assert back(1.0, 0.0).by_swap_ns(sequence) == 12 * BLOCK_NS
    sequence.num_host_blocks = 4
    assert back(1.0, 0.0).by_swap_ns(sequence) == 8 * BLOCK_NS
    sequence.num_host_blocks = 40
    assert back(1.0, 0.0).by_swap_ns(sequence) == 6 * BLOCK_NS


def test_what_was_lacking_before_has_to_be_got_back_too_but_once():
    # Of 22 tokens 10 are left: the third block is begun, and two more and a part are lacking.
    sequence = sequence_of(10, num_reached=22)
    assert back(1.0, 0.0).by_finding_ns(sequence) == 2 * TOKEN_NS + 5 * BLOCK_NS
    assert back(1.0, 0.0).by_computing_ns(sequence, 8) == 14 * TOKEN_NS
    swap_ns = 6 * BLOCK_NS + 2 * TOKEN_NS + 3 * BLOCK_NS
    assert back(1.0, 0.0).by_swap_ns(sequence) == swap_ns


def test_who_keeps_all_has_nothing_to_compute():
    assert back(1.0, 0.0).by_computing_ns(sequence_of(22), 24) == 0
