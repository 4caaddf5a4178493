"""Batches of records on disk, waiting to be encoded and sent: a bounded first-in, first-out queue.

Every batch passes through it, whether the collector is there or not. So there is one path to test,
a ring is emptied as fast as a disk takes it, however long encoding takes, and what a stopped
exporter could not send is sent by the next one. While sending keeps up, a file lives for
milliseconds in the page cache and hardly ever reaches the disk.
"""

import collections
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SPOOL_BYTES_DEFAULT: Final = 1024 * 1024 * 1024
_SUFFIX: Final = ".records"


@dataclass(frozen=True, slots=True)
class SpoolEntry:
    """One waiting batch: its file, the file's size, and how many records it holds."""

    path: Path
    num_bytes: int
    num_records: int


class Spool:
    """A queue of packed batches in a folder; one thread puts, another takes."""

    def __init__(self, folder: Path, num_bytes_max: int = SPOOL_BYTES_DEFAULT) -> None:
        """Make the folder if needed and take over what waits in it.

        Raises:
            OSError: if the folder cannot be made or listed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._num_bytes_max = num_bytes_max
        self._changed = threading.Condition()
        self._num_put = 0
        found = sorted(folder.glob(f"*{_SUFFIX}"))
        self._entries = collections.deque(
            SpoolEntry(path, path.stat().st_size, _num_records_in_name(path)) for path in found
        )
        self._num_bytes = sum(entry.num_bytes for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_records(self) -> int:
        """Records that wait."""
        with self._changed:
            return sum(entry.num_records for entry in self._entries)

    def has_room(self, num_bytes: int) -> bool:
        """Whether a batch of this size would be taken."""
        return self._num_bytes + num_bytes <= self._num_bytes_max

    def put(self, batch: bytes, num_records: int) -> bool:
        """Add a batch at the end; False when the spool or the disk is full."""
        if not self.has_room(len(batch)):
            return False
        self._num_put += 1
        name = f"{time.time_ns():020d}-{os.getpid()}-{self._num_put}-{num_records}{_SUFFIX}"
        path = self._folder / name
        draft = path.with_suffix(".new")
        try:
            draft.write_bytes(batch)
            draft.rename(path)
        except OSError:
            draft.unlink(missing_ok=True)
            return False
        with self._changed:
            self._entries.append(SpoolEntry(path, len(batch), num_records))
            self._num_bytes += len(batch)
            self._changed.notify()
        return True

    def oldest(self, timeout_s: float) -> SpoolEntry | None:
        """The first entry, which stays; waits for one at most ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._entries, timeout_s)
            return self._entries[0] if self._entries else None

    def remove(self, entry: SpoolEntry) -> None:
        """Forget the first entry, which ``oldest`` returned, and its file."""
        with self._changed:
            assert self._entries[0] is entry, f"{entry.path.name} is not the first entry"
            self._entries.popleft()
            self._num_bytes -= entry.num_bytes
        entry.path.unlink(missing_ok=True)

    def wake(self) -> None:
        """Let ``oldest`` return at once if it waits."""
        with self._changed:
            self._changed.notify_all()


def _num_records_in_name(path: Path) -> int:
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0
