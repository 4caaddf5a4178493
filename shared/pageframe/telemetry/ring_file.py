"""Files of rings: made at full size by the producer, locked by the one reader."""

import errno
import fcntl
import mmap
import os
from pathlib import Path

from pageframe.core.errors import NotFoundError, ResourceExhaustedError, UnavailableError


def map_new_file(path: Path, num_bytes: int) -> mmap.mmap:
    """Make a file of ``num_bytes`` zeros, private to the user, and map it.

    Raises:
        ResourceExhaustedError: ``RING_NO_ROOM``, if the file system has no room for it.
        OSError: if the file cannot be made.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Reserved now: a full tmpfs is an error here, and would be a SIGBUS at the first write.
        os.posix_fallocate(file, 0, num_bytes)
        return mmap.mmap(file, num_bytes)
    except OSError as error:
        path.unlink()
        if error.errno != errno.ENOSPC:
            raise
        raise ResourceExhaustedError(
            "RING_NO_ROOM",
            f"{path.parent} has no room for a trace ring of {num_bytes} bytes: make room there, "
            "or give --trace off",
            num_ring_bytes=num_bytes,
        ) from None
    finally:
        os.close(file)


def open_exclusively(path: Path) -> int:
    """Open the file for reading and writing, and lock it until the descriptor is closed.

    Raises:
        NotFoundError: ``RING_NOT_FOUND``, if there is no file.
        UnavailableError: ``RING_HAS_READER``, if another process has the lock.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError("RING_NOT_FOUND", f"there is no ring at {path}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UnavailableError("RING_HAS_READER", f"{path} is read by another process") from None
    return file
