"""A reserved range takes memory where it is written, and gives whole pages back."""

import ctypes
import mmap
import resource
from pathlib import Path

import pytest

from pageframe.executor.model import reserved_range
from pageframe.executor.model.reserved_range import ReservedRange, large_page_bytes

_PAGE = mmap.PAGESIZE
_MIB = 1 << 20


@pytest.fixture(params=["small", "large"])
def page_bytes(request, monkeypatch):
    """What ranges of enough bytes are made of; also where the system has no large pages."""
    is_large = request.param == "large"
    if is_large and large_page_bytes() == 0:
        pytest.skip("this system has no large pages")
    if not is_large:
        monkeypatch.setattr(reserved_range, "large_page_bytes", lambda: 0)
    return large_page_bytes() if is_large else _PAGE


def _address(reserved):
    return ctypes.addressof(ctypes.c_char.from_buffer(reserved.buffer))


def _mapping_of(address):
    """What the system says of the mapping that an address lies in, as name and words."""
    facts, is_found = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            first, _, end = name.partition("-")
            is_found = int(first, 16) <= address < int(end, 16)
        elif is_found:
            facts[name] = rest.split()
    return facts


def _process_bytes():
    """Resident memory of the whole process, as the system counts it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_range_takes_memory_page_by_page_as_it_is_written(page_bytes):
    reserved = ReservedRange(12 * page_bytes)
    assert (reserved.page_bytes, len(reserved.buffer)) == (page_bytes, 12 * page_bytes)
    assert reserved.resident_bytes == 0
    reserved.buffer[5 * page_bytes] = 1
    reserved.buffer[9 * page_bytes - 1 : 9 * page_bytes + 1] = b"ab"
    # A large page that cannot be had is a small one.
    assert 3 * _PAGE <= reserved.resident_bytes <= 3 * page_bytes
    assert reserved.buffer[5 * page_bytes + 1] == 0


def test_pages_from_a_byte_on_go_back_and_the_page_of_that_byte_stays(page_bytes):
    reserved = ReservedRange(10 * page_bytes)
    reserved.buffer[:] = b"x" * (10 * page_bytes)
    assert reserved.release(3 * page_bytes + 7) == 4 * page_bytes
    assert reserved.resident_bytes == 4 * page_bytes
    assert reserved.buffer[: 4 * page_bytes] == b"x" * (4 * page_bytes)
    assert reserved.buffer[4 * page_bytes :] == bytes(6 * page_bytes)
    reserved.buffer[:] = b"y" * (10 * page_bytes)
    assert reserved.release(2 * page_bytes) == 2 * page_bytes
    assert reserved.resident_bytes == 2 * page_bytes


def test_an_end_inside_a_page_is_given_back_with_its_page(page_bytes):
    reserved = ReservedRange(2 * page_bytes + 100)
    assert reserved.resident_bytes == 0
    reserved.buffer[:] = b"x" * (2 * page_bytes + 100)
    assert 2 * page_bytes + _PAGE <= reserved.resident_bytes <= 3 * page_bytes
    assert reserved.release(2 * page_bytes + 1) == 3 * page_bytes
    assert 2 * page_bytes + _PAGE <= reserved.resident_bytes <= 3 * page_bytes
    assert reserved.buffer[2 * page_bytes :] == b"x" * 100
    reserved.release(page_bytes + 1)
    assert reserved.resident_bytes == 2 * page_bytes
    reserved.release(0)
    assert reserved.resident_bytes == 0


def test_a_range_of_enough_bytes_lies_over_whole_large_pages_that_were_asked_for():
    size = large_page_bytes()
    if size == 0:
        pytest.skip("this system has no large pages")
    for num_bytes in (size, size + 1, 3 * size - 1):
        reserved = ReservedRange(num_bytes)
        assert _address(reserved) % size == 0
        assert "hg" in _mapping_of(_address(reserved))["VmFlags:"]
        assert "hg" in _mapping_of(_address(reserved) + num_bytes - 1)["VmFlags:"]
    small = ReservedRange(size - 1)
    assert small.page_bytes == _PAGE
    assert "hg" not in _mapping_of(_address(small))["VmFlags:"]


def test_a_range_begins_at_a_page_wherever_its_mapping_begins(monkeypatch):
    # A mapping at a multiple of all these would be a rare accident.
    for num_pages in (3, 5, 7, 11, 13):
        size = num_pages * _PAGE
        monkeypatch.setattr(reserved_range, "large_page_bytes", lambda size=size: size)
        reserved = ReservedRange(4 * size)
        assert _address(reserved) % size == 0
        reserved.buffer[:] = b"x" * (4 * size)
        assert reserved.resident_bytes == 4 * size
        assert reserved.release(2 * size - 1) == 2 * size
        assert reserved.resident_bytes == 2 * size
        assert reserved.buffer == b"x" * (2 * size) + bytes(2 * size)


def test_the_size_of_large_pages_is_the_systems_unless_one_is_huge(tmp_path):
    assert large_page_bytes(tmp_path) == 0
    file = tmp_path / "sys/kernel/mm/transparent_hugepage/hpage_pmd_size"
    file.parent.mkdir(parents=True)
    for said, expected in (("2097152\n", 2 * _MIB), ("1048576\n", _MIB), ("536870912\n", 0)):
        file.write_text(said)
        assert large_page_bytes(tmp_path) == expected


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


def test_memory_is_taken_ahead_of_a_write_and_what_was_written_stays(page_bytes):
    reserved = ReservedRange(6 * page_bytes)
    reserved.buffer[page_bytes : page_bytes + 3] = b"xyz"
    if not reserved.take_memory(0, 0):
        pytest.skip("this system takes memory only for what is written")
    assert reserved.resident_bytes == page_bytes
    assert reserved.take_memory(page_bytes - 1, 3 * page_bytes + 1)
    assert reserved.resident_bytes == 4 * page_bytes
    assert reserved.buffer[: 2 * page_bytes] == (bytes(page_bytes) + b"xyz" + bytes(page_bytes - 3))
    reserved.release(page_bytes)
    assert reserved.resident_bytes == page_bytes
