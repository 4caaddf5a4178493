import random

import pytest

from pageframe.scheduler.decode import DecodeSet
from unit.scheduler.test_sequence import make_sequence


def test_a_block_is_needed_when_a_position_begins_one():
    decodes = DecodeSet(block_size=4)
    decodes.join(make_sequence(6, max_tokens=20), position=6, tick=10)
    needs = [decodes.num_blocks_at(tick) for tick in range(10, 20)]
    # Positions 6 to 15; 8 and 12 begin a block.
    assert needs == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0]


def test_a_sequence_whose_last_token_is_in_flight_is_not_counted_again():
    decodes = DecodeSet(block_size=4)
    # Four output tokens: the prefill gives the first, ticks 10, 11 and 12 the rest.
    decodes.join(make_sequence(6, max_tokens=4), position=6, tick=10)
    assert decodes.num_at(12, num_in_flight=1) == 1
    assert decodes.num_at(13, num_in_flight=1) == 0


def test_a_prefill_that_ends_with_its_first_token_never_decodes():
    decodes = DecodeSet(block_size=4)
    decodes.join(make_sequence(6, max_tokens=1), position=6, tick=10)
    assert decodes.num_at(10, num_in_flight=1) == 0


def test_joining_again_at_the_same_pace_changes_nothing_and_at_another_moves():
    decodes = DecodeSet(block_size=4)
    sequence = make_sequence(6, max_tokens=20)
    decodes.join(sequence, position=6, tick=10)
    decodes.join(sequence, position=8, tick=12)
    assert (len(decodes), sequence.decode_origin) == (1, -4)
    decodes.join(sequence, position=8, tick=11)
    assert (len(decodes), sequence.decode_origin) == (1, -3)
    assert decodes.num_blocks_at(11) == 1
    decodes.leave(sequence)
    assert len(decodes) == 0
    with pytest.raises(AssertionError, match="does not decode"):
        decodes.leave(sequence)


def test_children_of_a_fork_copy_a_block_in_their_first_tick_and_no_later():
    decodes = DecodeSet(block_size=4)
    children = [make_sequence(6, sequence_id, max_tokens=20) for sequence_id in (1, 2, 3)]
    decodes.join(make_sequence(6, 4, max_tokens=20), position=6, tick=10)
    for child in children:
        decodes.join(child, position=6, tick=10, copies_block=True)
    assert [decodes.num_blocks_at(tick) for tick in range(9, 13)] == [0, 3, 0, 4]
    decodes.leave(children[0])
    # One that goes on at another pace has been put right after a refusal; it copies nothing more.
    decodes.join(children[1], position=6, tick=11)
    assert decodes.num_blocks_at(10) == 1
    assert decodes.tick_of(children[2], 6) == 10
    for child in children[1:]:
        decodes.leave(child)
    assert decodes._num_copies == {}


@pytest.mark.parametrize("block_size", [1, 4, 16, 256])
def test_counts_equal_a_walk_over_all_sequences(block_size):
    print(f"seed={block_size}")
    rng = random.Random(block_size)
    decodes = DecodeSet(block_size)
    positions = {}
    for tick in range(1, 400):
        for _ in range(rng.randint(0, 2)):
            sequence = make_sequence(rng.randint(1, 300), rng.randrange(10**9), max_tokens=500)
            positions[sequence] = rng.randint(1, 300)
            decodes.join(sequence, position=positions[sequence], tick=tick)
        while positions and rng.random() < 0.4:
            sequence = rng.choice(list(positions))
            del positions[sequence]
            decodes.leave(sequence)
        assert decodes.num_blocks_at(tick) == sum(p % block_size == 0 for p in positions.values())
        assert set(decodes.cut_after(tick)) == {s for s, p in positions.items() if p % 128 == 127}
        positions = {sequence: position + 1 for sequence, position in positions.items()}
