"""The generator is the published one, and every key has its own number."""

import numpy as np
import pytest

from pageframe.executor.model.philox import philox4x32, uniform

# philox4x32, 10 rounds, from kat_vectors of the Random123 distribution: counter, key, output.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return np.array([[int(word, 16)] for word in text.split()], dtype=np.uint64)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    assert philox4x32(words(counter), words(key)).tolist() == words(output).tolist()


def test_known_answers_in_one_batch():
    counters = np.hstack([words(counter) for counter, _, _ in KNOWN_ANSWERS])
    keys = np.hstack([words(key) for _, key, _ in KNOWN_ANSWERS])
    outputs = np.hstack([words(output) for _, _, output in KNOWN_ANSWERS])
    assert (philox4x32(counters, keys) == outputs).all()


def test_uniform_reads_the_first_two_words():
    number = uniform(np.zeros(1, np.uint64), np.zeros(1, np.uint32), np.zeros(1, np.uint32))
    assert number[0] == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_each_of_seed_sample_and_position_gives_new_numbers():
    index = np.arange(1000)
    zeros = np.zeros(1000, dtype=np.uint32)
    seeds = zeros.astype(np.uint64)
    high = index.astype(np.uint64) << np.uint64(32)
    numbers = [
        uniform(index.astype(np.uint64), zeros, zeros),
        uniform(high, zeros, zeros),
        uniform(seeds, index.astype(np.uint32), zeros),
        uniform(seeds, zeros, index.astype(np.int32)),
    ]
    # The four runs share only their first key, which is all zeros.
    assert len(np.unique(np.concatenate(numbers))) == 4 * 999 + 1


def test_uniform_fills_the_unit_interval_evenly():
    position = np.arange(100_000, dtype=np.uint32)
    numbers = uniform(np.full(100_000, 7, np.uint64), np.zeros_like(position), position)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = np.bincount((numbers * 100).astype(int), minlength=100)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 99 + 4 * np.sqrt(2 * 99)
    # Neighbours in position are not alike either.
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01
