"""Room for drafts, and what is given back of it."""

import numpy as np
import pytest

from pageframe.core.replica import TenantQuota
from pageframe.executor.memory.drafts import cover_drafts, give_back
from unit.memory.memories import Harness, announcement, entries
from unit.memory.test_layer_groups import Grouped


def started(num_tokens: int, **options) -> tuple[Harness, int]:
    """A sequence that has the block of its newest token, as at the start of a decode."""
    house = Harness(**options)
    house.run(announce=[announcement(1, num_tokens, tenant="t")], may=entries((1, 0, num_tokens)))
    house.apply()
    return house, house.row(1)


def test_what_fits_into_the_last_block_takes_none():
    house, row = started(5)
    assert cover_drafts(house.memory, row, 2, 9) == (2, 0)
    assert house.memory.tables.blocks_of(row).tolist() == [0, 1]


def test_more_takes_as_many_as_it_needs():
    house, row = started(5)
    assert cover_drafts(house.memory, row, 3, 9) == (3, 1)
    assert cover_drafts(house.memory, row, 11, 9) == (11, 2)
    assert house.memory.tables.blocks_of(row).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("num_blocks_max", "expected"), [(0, (2, 0)), (1, (6, 1)), (2, (9, 2))])
def test_no_more_blocks_than_are_granted(num_blocks_max, expected):
    house, row = started(5)
    assert cover_drafts(house.memory, row, 9, num_blocks_max) == expected


def test_what_is_not_there_is_not_taken():
    house, row = started(5, num_blocks=2)
    assert cover_drafts(house.memory, row, 9, 9) == (2, 0)
    assert house.memory.pool.num_free == 0


def test_no_ceiling_is_passed():
    house, row = started(5)
    house.memory.quotas.set(TenantQuota(tenant="t", ceiling_blocks=2), 8)
    assert cover_drafts(house.memory, row, 9, 9) == (2, 0)


@pytest.mark.parametrize(
    ("num_computed", "kept"), [(6, [0, 1]), (8, [0, 1]), (9, [0, 1, 2]), (14, [0, 1, 2, 3])]
)
def test_blocks_behind_the_last_computed_token_are_given_back(num_computed, kept):
    house, row = started(5)
    cover_drafts(house.memory, row, 8, 9)
    house.memory.sequences.num_computed[row] = num_computed
    give_back(house.memory, np.array([row], dtype=np.int32))
    assert house.memory.tables.blocks_of(row).tolist() == kept
    assert house.memory.account().held == len(kept)
    assert house.memory.sequences.at_row(row).num_blocks_peak == (4 if len(kept) < 4 else 0)


def test_each_group_of_layers_takes_and_gives_back_its_own():
    house = Grouped()
    house.start(1, list(range(50, 55)))
    house.apply()
    row = house.row(1)
    # One block is granted, and one is needed in each of two groups.
    assert cover_drafts(house.memory, row, 5, 1) == (2, 0)
    assert cover_drafts(house.memory, row, 5, 2) == (5, 2)
    assert house.table(1) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    house.memory.sequences.num_computed[row] = 7
    give_back(house.memory, np.array([row], dtype=np.int32))
    assert house.table(1) == ([0, 1, 2, 3], [0, 1, 2, 3])
