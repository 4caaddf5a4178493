"""A range of addresses that takes memory only where it is written, and can give pages back."""

import ctypes
import mmap

import numpy as np

# In the module since Python 3.13; the number is Linux's on x86 and Arm.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


class ReservedRange:
    """An anonymous mapping of this process alone.

    Private, because ``MADV_DONTNEED`` frees nothing of a shared one, which is what ``mmap`` makes
    unless told otherwise. Without reserve, so that a range far larger than what will be used does
    not fail at once where the kernel guards against overcommitting.

    Attributes:
        buffer: The bytes, zero where never written. Lives as long as somebody refers to it.
    """

    def __init__(self, num_bytes: int) -> None:
        """Reserve addresses.

        Raises:
            MemoryError: there are not so many, or the system reserves memory for all of them.
        """
        assert num_bytes >= 0, f"a range of {num_bytes} bytes"
        self._num_bytes = num_bytes
        try:
            # A mapping cannot be empty; a range can.
            self.buffer = mmap.mmap(-1, max(num_bytes, 1), flags=_FLAGS)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"{num_bytes} bytes of addresses: {error}") from error
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))

    def release(self, start: int) -> int:
        """Give the memory of the bytes from ``start`` on back to the system, in whole pages.

        The page in which ``start`` lies is kept, content and all, unless it begins there. What
        was given back reads as zero and takes memory again once it is written.

        Returns:
            First byte that was given back, ``start`` rounded up to a page.
        """
        assert 0 <= start <= self._num_bytes, f"byte {start} of {self._num_bytes}"
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        if first < self._num_bytes:
            self.buffer.madvise(mmap.MADV_DONTNEED, first, self._num_bytes - first)
        return first

    @property
    def resident_bytes(self) -> int:
        """Bytes of the range that are in memory, in whole pages; asks the kernel for each page."""
        num_pages = -(-self._num_bytes // mmap.PAGESIZE)
        is_resident = np.zeros(num_pages, dtype=np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.mincore(
            ctypes.c_void_p(self._address),
            ctypes.c_size_t(self._num_bytes),
            ctypes.c_void_p(is_resident.ctypes.data),
        )
        assert result == 0, f"mincore failed with error {ctypes.get_errno()}"
        # The other bits are reserved.
        return int(np.count_nonzero(is_resident & 1)) * mmap.PAGESIZE
