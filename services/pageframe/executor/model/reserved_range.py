"""A range of addresses that takes memory only where it is written, and can give pages back.

Where the system has large pages, a range that fills at least one is laid over whole ones:

    mapping   │ · · │  page  │  page  │  page  │ · · │      page_bytes each, aligned
                    │ buffer ───────────────▶│

Keys and values lie in a pool in any order, and a processor remembers the places of few small
pages: with large ones decode attention reads from memory 5 to 25 % faster. To take 2 MiB for the
first time costs 0.2 ms as one page and 1.3 to 1.9 ms as 512 small ones. ``bench.kv_pages`` measures
both. What it costs is that memory comes and goes 2 MiB at a time.
"""

import ctypes
import mmap
from pathlib import Path

import numpy as np

# In the module since Python 3.13; the number is Linux's on x86 and Arm.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_LARGE_PAGE_SIZE_FILE = Path("sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
# Arm systems with pages of 64 KiB have large ones of 512 MiB: few blocks would take one whole.
_LARGE_PAGE_BYTES_MAX = 2 << 20
# Not in the module; Linux has it since 5.14.
_MADV_POPULATE_WRITE = 23


def large_page_bytes(root: Path = Path("/")) -> int:
    """Bytes of a large page that the system gives to who asks; 0 if it has none, or huge ones.

    Whoever runs the system may have turned them off for all the same, and there may be none left:
    small pages come then, and nothing else changes.

    Args:
        root: Where ``sys`` is mounted.
    """
    try:
        num_bytes = int((root / _LARGE_PAGE_SIZE_FILE).read_text())
    except OSError:
        return 0  # A kernel without them has no such file, and a sandbox may hide it.
    return num_bytes if num_bytes <= _LARGE_PAGE_BYTES_MAX else 0


class ReservedRange:
    """An anonymous mapping of this process alone.

    Private, because ``MADV_DONTNEED`` frees nothing of a shared one, which is what ``mmap`` makes
    unless told otherwise. Without reserve, so that a range far larger than what will be used does
    not fail at once where the kernel guards against overcommitting.

    Attributes:
        buffer: The bytes, zero where never written. Lives as long as somebody refers to it.
        page_bytes: Memory is taken by so many bytes at most, and given back by so many; ``buffer``
            begins at a multiple of it.
    """

    def __init__(self, num_bytes: int) -> None:
        """Reserve addresses.

        Raises:
            MemoryError: there are not so many, or the system reserves memory for all of them.
        """
        assert num_bytes >= 0, f"a range of {num_bytes} bytes"
        large_bytes = large_page_bytes()
        is_large = 0 < large_bytes <= num_bytes
        self.page_bytes = large_bytes if is_large else mmap.PAGESIZE
        # A mapping cannot be empty; a range can.
        self._whole_bytes = _round_up(max(num_bytes, 1), self.page_bytes)
        slack_bytes = large_bytes if is_large else 0
        try:
            self._mapping = mmap.mmap(-1, self._whole_bytes + slack_bytes, flags=_FLAGS)
            self._start = -_address(self._mapping) % self.page_bytes
            if is_large:
                self._mapping.madvise(mmap.MADV_HUGEPAGE, self._start, self._whole_bytes)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"{num_bytes} bytes of addresses: {error}") from error
        self._num_bytes = num_bytes
        self.buffer = memoryview(self._mapping)[self._start :][: max(num_bytes, 1)]

    def release(self, start: int) -> int:
        """Give the memory of the bytes from ``start`` on back to the system, in whole pages.

        The page in which ``start`` lies is kept, content and all, unless it begins there: the
        system could map a part of a large page no longer, but would keep all of its memory. What
        was given back reads as zero and takes memory again once it is written.

        Returns:
            First byte that was given back, ``start`` rounded up to a page.
        """
        assert 0 <= start <= self._num_bytes, f"byte {start} of {self._num_bytes}"
        first = _round_up(start, self.page_bytes)
        if first < self._whole_bytes:
            self._mapping.madvise(
                mmap.MADV_DONTNEED, self._start + first, self._whole_bytes - first
            )
        return first

    def take_memory(self, start: int, end: int) -> bool:
        """Take memory for the bytes ``[start, end)`` now, in whole pages, as a write to each would.

        What they hold stays. Python's lock is given up meanwhile.

        Returns:
            Whether the system did; one that cannot takes it when they are written.
        """
        assert 0 <= start <= end <= self._num_bytes, f"[{start}, {end}) of {self._num_bytes}"
        first = start // self.page_bytes * self.page_bytes
        libc = ctypes.CDLL(None, use_errno=True)
        result: int = libc.madvise(
            ctypes.c_void_p(_address(self._mapping) + self._start + first),
            ctypes.c_size_t(_round_up(end, self.page_bytes) - first),
            ctypes.c_int(_MADV_POPULATE_WRITE),
        )
        return result == 0

    @property
    def resident_bytes(self) -> int:
        """Bytes of the range that are in memory, in whole pages; asks the kernel for each page."""
        num_pages = self._whole_bytes // mmap.PAGESIZE
        is_resident = np.zeros(num_pages, dtype=np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.mincore(
            ctypes.c_void_p(_address(self._mapping) + self._start),
            ctypes.c_size_t(self._whole_bytes),
            ctypes.c_void_p(is_resident.ctypes.data),
        )
        assert result == 0, f"mincore failed with error {ctypes.get_errno()}"
        # The other bits are reserved.
        return int(np.count_nonzero(is_resident & 1)) * mmap.PAGESIZE


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
