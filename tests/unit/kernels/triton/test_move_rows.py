"""Rows move byte for byte, whatever their size, and copies inside a pool keep their order."""

import pytest
import torch

from pageframe.kernels.ops.move_rows import copy_rows, move_rows
from pageframe.kernels.reference.copy_blocks import copy_blocks
from pageframe.kernels.reference.move_rows import move_rows as move_rows_plainly
from unit.kernels.pools import random_pool


def _random_rows(num_rows, row_bytes, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 256, (num_rows, row_bytes), dtype=torch.uint8, generator=generator)
    return rows.to(device)


# 4 and 68: no 16 bytes fit; 16,448: one slice and a bit; 32,768: exactly two.
@pytest.mark.parametrize("row_bytes", [4, 64, 68, 16448, 32768])
def test_blocks_are_gathered_and_scattered_as_named(device, row_bytes):
    arena = _random_rows(7, row_bytes, device)
    staging = torch.zeros(3, row_bytes, dtype=torch.uint8, device=device)
    ids = torch.tensor([6, 0, 3], device=device)
    places = torch.arange(3, device=device)
    move_rows(arena, ids, staging, places)
    expected = torch.zeros_like(staging)
    move_rows_plainly(arena, ids, expected, places)
    assert torch.equal(staging, expected)

    before = arena.clone()
    targets = torch.tensor([1, 5, 2], device=device)
    move_rows(staging, places, arena, targets)
    move_rows_plainly(expected, places, before, targets)
    assert torch.equal(arena, before)


def test_rows_further_apart_than_they_are_long_leave_the_gap_alone(device):
    memory = _random_rows(5, 256, device)
    before, rows = memory.clone(), memory[:, :128]
    move_rows(rows, torch.tensor([4], device=device), rows, torch.tensor([1], device=device))
    before[1, :128] = before[4, :128]
    assert torch.equal(memory, before)


def test_nothing_moves_where_nothing_is_named(device):
    rows = _random_rows(2, 64, device)
    before, none = rows.clone(), torch.zeros(0, dtype=torch.int64, device=device)
    move_rows(rows, none, rows, none)
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    ("sources", "targets"),
    [
        ([], []),
        ([3], [5]),
        # Block 2 is both target and source; 5 is copied twice.
        ([0, 2, 5, 5], [2, 3, 1, 6]),
        # The same chain told backwards, a swap, a ring of three, and a copy to itself.
        ([2, 0], [3, 2]),
        ([1, 4], [4, 1]),
        ([0, 1, 2], [1, 2, 0]),
        ([6, 6], [6, 2]),
    ],
)
def test_copies_inside_a_pool_read_before_they_write(device, sources, targets):
    pool = random_pool(7, 4, 2, 5, torch.int8).rows
    expected, rows = pool.clone(), pool.to(device)
    sources = torch.tensor(sources, dtype=torch.int64)
    targets = torch.tensor(targets, dtype=torch.int64)
    copy_rows(rows, sources, targets)
    copy_blocks(expected, sources, targets)
    assert torch.equal(rows.cpu(), expected)


def test_random_copies_inside_a_pool_equal_the_reference(device):
    seed = int(torch.randint(2**31, ()).item())
    print(f"seed={seed}")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        pool = random_pool(9, 2, 1, 4, torch.int8, seed).rows
        expected, rows = pool.clone(), pool.to(device)
        num_copies = int(torch.randint(1, 10, (), generator=generator).item())
        targets = torch.randperm(9, generator=generator)[:num_copies]
        sources = torch.randint(9, (num_copies,), generator=generator)
        copy_rows(rows, sources, targets)
        copy_blocks(expected, sources, targets)
        assert torch.equal(rows.cpu(), expected)


def test_rows_that_cannot_move_are_refused(device):
    rows, ids = _random_rows(4, 64, device), torch.tensor([0, 1], device=device)
    with pytest.raises(ValueError, match="2 sources for 1 targets"):
        move_rows(rows, ids, rows, ids[:1])
    with pytest.raises(ValueError, match="rows of 64 bytes do not fit rows of 32"):
        move_rows(rows, ids, rows[:, :32], ids)
    with pytest.raises(ValueError, match="no multiple of 4 bytes"):
        move_rows(rows[:, :30], ids, rows[:, :30], ids)
    with pytest.raises(ValueError, match="not contiguous"):
        move_rows(rows[:, ::2], ids, rows, ids)
