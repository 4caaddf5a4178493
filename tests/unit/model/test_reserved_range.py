"""A reserved range takes memory where it is written, and gives whole pages back."""

import mmap
import resource
from pathlib import Path

import pytest

from pageframe.executor.model.reserved_range import ReservedRange

_PAGE = mmap.PAGESIZE
_MIB = 1 << 20


def _process_bytes():
    """Resident memory of the whole process, as the system counts it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_range_takes_memory_page_by_page_as_it_is_written():
    reserved = ReservedRange(1000 * _PAGE)
    assert reserved.resident_bytes == 0
    reserved.buffer[5 * _PAGE] = 1
    reserved.buffer[9 * _PAGE - 1 : 9 * _PAGE + 1] = b"ab"
    assert reserved.resident_bytes == 3 * _PAGE
    assert reserved.buffer[5 * _PAGE + 1] == 0


def test_pages_from_a_byte_on_go_back_and_the_page_of_that_byte_stays():
    reserved = ReservedRange(10 * _PAGE)
    reserved.buffer[:] = b"x" * (10 * _PAGE)
    assert reserved.release(3 * _PAGE + 7) == 4 * _PAGE
    assert reserved.resident_bytes == 4 * _PAGE
    assert reserved.buffer[: 4 * _PAGE] == b"x" * (4 * _PAGE)
    assert reserved.buffer[4 * _PAGE :] == bytes(6 * _PAGE)
    reserved.buffer[:] = b"y" * (10 * _PAGE)
    assert reserved.release(2 * _PAGE) == 2 * _PAGE
    assert reserved.resident_bytes == 2 * _PAGE


def test_an_end_inside_a_page_is_given_back_with_its_page():
    reserved = ReservedRange(2 * _PAGE + 100)
    reserved.buffer[:] = b"x" * (2 * _PAGE + 100)
    assert reserved.resident_bytes == 3 * _PAGE
    assert reserved.release(2 * _PAGE + 1) == 3 * _PAGE
    assert reserved.resident_bytes == 3 * _PAGE
    reserved.release(_PAGE + 1)
    assert reserved.resident_bytes == 2 * _PAGE
    reserved.release(0)
    assert reserved.resident_bytes == 0


def test_the_system_gets_the_memory_that_is_given_back():
    reserved = ReservedRange(256 * _MIB)
    before_bytes = _process_bytes()
    for start in range(0, 256 * _MIB, _MIB):
        reserved.buffer[start : start + _MIB] = b"x" * _MIB
    full_bytes = _process_bytes()
    reserved.release(64 * _MIB)
    after_bytes = _process_bytes()
    assert full_bytes - before_bytes > 240 * _MIB
    assert full_bytes - after_bytes > 180 * _MIB


def test_addresses_may_go_far_beyond_what_the_machine_has():
    reserved = ReservedRange(1 << 40)
    reserved.buffer[(1 << 40) - 1] = 7
    assert reserved.buffer[(1 << 40) - 2 :] == b"\x00\x07"


def test_an_empty_range_is_one():
    reserved = ReservedRange(0)
    assert reserved.release(0) == 0
    assert reserved.resident_bytes == 0


@pytest.mark.parametrize("num_bytes", [1 << 60, 1 << 63, 1 << 80])
def test_more_than_there_are_addresses_is_a_memory_error(num_bytes):
    with pytest.raises(MemoryError, match=str(num_bytes)):
        ReservedRange(num_bytes)
