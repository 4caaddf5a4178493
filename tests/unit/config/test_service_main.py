"""Garbage collection while a service imports and loads."""

import gc

import pytest

from pageframe.config.service_main import collecting_no_garbage


@pytest.fixture(autouse=True)
def _as_it_was():
    assert gc.isenabled()
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_in_the_block_and_what_came_in_it_is_never_looked_at_again():
    gc.unfreeze()
    with collecting_no_garbage():
        assert not gc.isenabled()
        made = [[number] for number in range(100)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)
    assert not any(made is tracked for tracked in gc.get_objects())


def test_an_error_in_the_block_leaves_collecting_on():
    with pytest.raises(ZeroDivisionError), collecting_no_garbage():
        raise ZeroDivisionError
    assert gc.isenabled()
