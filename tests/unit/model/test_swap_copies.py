"""Copies beside steps are in order with them, and each wait is there for a reason."""

import random

import numpy as np
import pytest
import torch

from pageframe.executor.model import swap_copies
from pageframe.executor.model.swap_copies import SwapCopies, buffer_rows
from unit.model.two_streams import THREAD, Machine, PlayedMover, PlayedStream, RaceError

_NUM_BLOCKS, _NUM_SLOTS, _BLOCK_BYTES = 8, 6, 4


def _ids(*values):
    return np.array(values, np.int64)


class _House:
    """A pool, a host tier and the two streams; steps and moves as a runner does them."""

    def __init__(self, *, num_rows=2, deaf_compute=(), deaf_copies=()):
        self.machine = Machine()
        rows = _NUM_BLOCKS + _NUM_SLOTS
        content = torch.arange(rows * _BLOCK_BYTES, dtype=torch.uint8).view(rows, -1)
        self.blocks, self.slots = content[:_NUM_BLOCKS].clone(), content[_NUM_BLOCKS:].clone()
        buffers = [torch.zeros(num_rows, _BLOCK_BYTES, dtype=torch.uint8) for _ in range(2)]
        memories = {"block": self.blocks, "slot": self.slots, "a": buffers[0], "b": buffers[1]}
        self.mover = PlayedMover(self.machine, memories)
        self.compute = PlayedStream(self.machine, "compute", deaf_compute)
        self.stream = PlayedStream(self.machine, "copies", deaf_copies)
        self.copies = SwapCopies(
            self.slots, buffers, compute=self.compute, copies=self.stream, mover=self.mover
        )

    def store(self, *pairs):
        self.copies.store(self.blocks, *_columns(pairs))

    def load(self, *pairs):
        self.copies.load(self.blocks, *_columns(pairs))

    def step(self, reads=(), writes=()):
        """Compute: look at blocks, and write into others."""
        self.machine.touch([("block", it) for it in reads], [("block", it) for it in writes])
        for block in writes:
            self.blocks[block] += 100

    def look(self, slot):
        """The thread itself reads a slot, when copies have been waited for."""
        self.copies.finish()
        self.machine.touch([("slot", slot)], who=THREAD)
        return self.slots[slot].tolist()


def _columns(pairs):
    return _ids(*(first for first, _ in pairs)), _ids(*(second for _, second in pairs))


def _block(number):
    return list(range(number * _BLOCK_BYTES, (number + 1) * _BLOCK_BYTES))


def test_blocks_that_leave_may_be_written_at_once():
    house = _House()
    house.store((3, 0), (5, 1))
    house.step(writes=[3, 5])
    assert [house.look(slot) for slot in (0, 1)] == [_block(3), _block(5)]
    assert house.blocks[3].tolist() == [number + 100 for number in _block(3)]


def test_what_arrives_is_there_once_it_is_settled():
    house = _House()
    house.load((2, 7), (4, 1))
    house.step(reads=[0, 2], writes=[3])
    house.copies.settle()
    house.step(reads=[7, 1])
    assert [house.blocks[it].tolist() for it in (7, 1)] == [_block(10), _block(12)]


def test_a_block_that_is_read_before_it_is_settled_races():
    house = _House()
    house.load((2, 7))
    with pytest.raises(RaceError, match="compute reads block 7 beside copies"):
        house.step(reads=[7])


def test_a_slot_that_is_read_before_copies_are_finished_races():
    house = _House()
    house.store((3, 0))
    with pytest.raises(RaceError, match="thread reads slot 0 beside copies"):
        house.machine.touch([("slot", 0)], who=THREAD)


def test_a_slot_is_loaded_from_as_soon_as_it_is_stored_to():
    house = _House()
    house.store((3, 5))
    house.step(writes=[3])
    house.load((5, 6), (5, 2))
    house.copies.settle()
    house.step(reads=[6, 2])
    assert house.blocks[6].tolist() == house.blocks[2].tolist() == _block(3)


def test_slots_that_follow_one_another_are_one_copy():
    house = _House(num_rows=6)
    house.store((1, 3), (6, 0), (4, 2), (0, 5))
    # In the order of slots: 0, then 2 and 3, then 5; packed by one launch.
    assert house.mover.sent == [1, 2, 1]
    assert house.mover.num_launches == 1
    assert [house.look(slot) for slot in (0, 2, 3, 5)] == [
        _block(6),
        _block(4),
        _block(1),
        _block(0),
    ]


def test_more_blocks_than_staging_holds_take_turns():
    house = _House(num_rows=1)
    house.store(*((block, block) for block in range(5)))
    house.step(writes=range(5))
    house.load(*((slot, 7 - slot) for slot in range(5)))
    house.copies.settle()
    house.step(reads=range(3, 8))
    assert [house.blocks[7 - slot].tolist() for slot in range(5)] == [
        _block(slot) for slot in range(5)
    ]


def _one_leaves(house):
    house.store((0, 0))


def _more_leave_than_staging_holds(house):
    house.store((0, 0), (1, 1), (2, 2))


def _a_block_is_filled_that_a_step_reads(house):
    house.step(reads=[5])
    house.load((0, 5), (1, 6), (2, 7))


def _one_arrives_and_leaves(house):
    house.load((0, 5))
    house.store((5, 1))


def _one_arrives_and_is_read(house):
    house.load((0, 5))
    house.copies.settle()
    house.step(reads=[5])


@pytest.mark.parametrize(
    ("act", "deaf", "race"),
    [
        (_one_leaves, {"deaf_copies": [0]}, "copies reads a 0 beside compute"),
        (
            _more_leave_than_staging_holds,
            {"deaf_compute": [0]},
            "compute writes a 0 beside copies",
        ),
        (
            _a_block_is_filled_that_a_step_reads,
            {"deaf_copies": [0]},
            "copies writes block 5 beside compute",
        ),
        (_one_arrives_and_leaves, {"deaf_compute": [0]}, "compute reads block 5 beside copies"),
        (_one_arrives_and_is_read, {"deaf_compute": [0]}, "compute reads block 5 beside copies"),
    ],
)
def test_each_wait_is_there_for_a_reason(act, deaf, race):
    act(_House(num_rows=1))
    with pytest.raises(RaceError, match=race):
        act(_House(num_rows=1, **deaf))


@pytest.mark.parametrize("seed", range(20))
def test_random_moves_and_steps_never_race_and_move_the_right_bytes(seed):
    print(f"seed {seed}")
    chance = random.Random(seed)
    house = _House(num_rows=chance.randint(1, 3))
    blocks, slots = house.blocks.tolist(), house.slots.tolist()
    unsettled = set()
    for _ in range(60):
        act = chance.choice(["store", "load", "step", "settle", "look"])
        if act == "store":
            pairs = list(
                zip(
                    chance.sample(range(_NUM_BLOCKS), count := chance.randint(1, 5)),
                    chance.sample(range(_NUM_SLOTS), count),
                    strict=True,
                )
            )
            house.store(*pairs)
            unsettled.clear()
            for block, slot in pairs:
                slots[slot] = blocks[block]
        elif act == "load":
            targets = chance.sample(range(_NUM_BLOCKS), chance.randint(1, 5))
            pairs = [(chance.randrange(_NUM_SLOTS), target) for target in targets]
            house.load(*pairs)
            unsettled.update(targets)
            for slot, block in pairs:
                blocks[block] = slots[slot]
        elif act == "settle":
            house.copies.settle()
            unsettled.clear()
        elif act == "look":
            slot = chance.randrange(_NUM_SLOTS)
            assert house.look(slot) == slots[slot]
        else:
            free = [block for block in range(_NUM_BLOCKS) if block not in unsettled]
            touched = chance.sample(free, min(len(free), 3))
            house.step(reads=touched[:2], writes=touched[2:])
            for block in touched[2:]:
                blocks[block] = [(number + 100) % 256 for number in blocks[block]]
        assert house.blocks.tolist() == blocks
    house.copies.finish()
    assert house.slots.tolist() == slots


def test_staging_is_bounded_and_holds_one_block_at_least(monkeypatch):
    monkeypatch.setattr(swap_copies, "BUFFER_BYTES", 1000)
    assert buffer_rows(50, 100) == 10
    assert buffer_rows(3, 100) == 3
    assert buffer_rows(3, 2000) == 1
