import random

import pytest

from bench.paper.buddy import BuddyAllocator, round_up_to_power_of_two


@pytest.mark.parametrize(("number", "power"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32)])
def test_rounding_up(number, power):
    assert round_up_to_power_of_two(number) == power


def test_a_region_is_halved_until_it_just_fits():
    memory = BuddyAllocator(16)
    assert memory.allocate(3) == 0
    assert memory.allocate(3) == 4
    assert memory.allocate(8) == 8
    assert memory.num_held == 16
    assert memory.allocate(1) is None


def test_free_halves_become_one_again():
    memory = BuddyAllocator(16)
    addresses = [memory.allocate(4) for _ in range(4)]
    assert addresses == [0, 4, 8, 12]
    memory.free(4)
    memory.free(8)
    # Eight slots are free side by side, but they are no buddies.
    assert memory.allocate(8) is None
    memory.free(0)
    assert memory.allocate(8) == 0
    memory.free(0)
    memory.free(12)
    assert memory.allocate(16) == 0


def test_a_memory_of_any_size_is_a_row_of_smaller_ones():
    memory = BuddyAllocator(13)
    assert [memory.allocate(size) for size in (8, 4, 1)] == [0, 8, 12]
    assert memory.allocate(1) is None
    for address in (12, 8, 0):
        memory.free(address)
    assert memory.num_held == 0
    assert memory.allocate(16) is None
    assert memory.allocate(8) == 0


def test_twelve_gib_hold_seven_regions_of_2048_tokens():
    """As in the paper: figure 13 has 7.00 batched requests for Orca (Max)."""
    memory = BuddyAllocator(15_728)
    regions = [memory.allocate(2048) for _ in range(8)]
    assert regions[-1] is None
    assert memory.num_held == 7 * 2048


@pytest.mark.parametrize("seed", range(5))
def test_regions_never_overlap_and_everything_comes_back(seed):
    print(f"seed={seed}")
    rng = random.Random(seed)
    num_slots = rng.randint(1, 300)
    memory = BuddyAllocator(num_slots)
    held: dict[int, int] = {}
    for _ in range(500):
        if held and rng.random() < 0.45:
            address = rng.choice(sorted(held))
            del held[address]
            memory.free(address)
        else:
            wanted = rng.randint(1, 40)
            address = memory.allocate(wanted)
            if address is not None:
                assert address not in held
                held[address] = round_up_to_power_of_two(wanted)
        taken = [slot for start, size in held.items() for slot in range(start, start + size)]
        assert len(taken) == len(set(taken)) == memory.num_held
        assert all(slot < num_slots for slot in taken)
    for address in held:
        memory.free(address)
    largest = 1 << (num_slots.bit_length() - 1)
    assert memory.num_held == 0
    assert memory.allocate(largest) == 0
