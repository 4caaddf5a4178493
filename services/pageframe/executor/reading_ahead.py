"""Has the kernel read weights from disk while libraries are imported: both take seconds."""

import os
from pathlib import Path

_NUM_BYTES_MAX = 1 << 30
"""More would push out of memory what others need, before anybody has looked at it."""


def read_ahead(folder: Path) -> None:
    """Ask for the first GiB of a folder's weights, in the order in which files are read.

    Returns without waiting for them. Says nothing of files that cannot be read: loading will.
    """
    num_bytes_left = _NUM_BYTES_MAX
    for path in sorted(folder.glob("*.safetensors")):
        if num_bytes_left <= 0:
            return
        num_bytes_left -= _ask_for(path, num_bytes_left)


def _ask_for(path: Path, num_bytes_max: int) -> int:
    """Bytes of the file that were asked for."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return 0
    try:
        num_bytes = min(num_bytes_max, os.fstat(descriptor).st_size)
        os.posix_fadvise(descriptor, 0, num_bytes, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
    return num_bytes
