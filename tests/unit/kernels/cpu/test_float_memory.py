"""Memory for logits: taken once, larger when more is asked for, alive as long as a tensor of it."""

import pytest

from pageframe.kernels.cpu import library
from pageframe.kernels.cpu.model import _FloatMemory


@pytest.fixture
def memory():
    choice = library.choose()
    if choice.library is None:
        pytest.skip(choice.reason)
    return _FloatMemory(choice.library)


def test_the_same_memory_serves_all_matrices_that_fit(memory):
    first = memory.take(5, 1000)
    assert (first.shape, first.is_contiguous()) == ((5, 1000), True)
    assert memory.take(8, 1000).data_ptr() == first.data_ptr()
    assert memory.take(1, 7).data_ptr() == first.data_ptr()
    assert memory.take(9, 1000).data_ptr() != first.data_ptr()


def test_what_was_taken_before_it_grew_can_still_be_read(memory):
    small = memory.take(3, 100).fill_(7.0)
    for num_rows in (100, 10_000):
        memory.take(num_rows, 300).fill_(1.0)
    assert (small == 7.0).all()


def test_no_rows_take_nothing(memory):
    assert memory.take(0, 10).shape == (0, 10)
    assert memory.take(2, 3).shape == (2, 3)
