"""A byte ring in shared memory: one process writes records, another reads them.

It replaces a queue: no lock, no system call and no copy by the kernel between the two. The file
(in ``/dev/shm``, or any folder) is mapped by both sides:

    byte 0      magic, capacity, producer, incarnation, mode, service      written once
    byte 128    head, dropped, closed                                      written by the producer
    byte 192    tail, and what the reader must remember over a restart     written by the reader
    byte 4096   capacity bytes of records

``head`` and ``tail`` count bytes ever written and ever consumed; the place in the ring is their
value modulo the capacity, so ``head - tail`` is what waits and nothing needs a wrap flag. Records
are multiples of 8 bytes and never cross the end: a PAD record fills what is left there. Each
starts with ``<length: u32> <kind: u16>``.

Memory ordering. A record is complete before ``head`` moves over it, and ``head`` moves by one
aligned 8-byte store (item assignment on a memoryview of format ``Q``, which CPython compiles to a
single move). x86-64 keeps stores, and loads, in program order, so nothing more is needed. Other
machines, ARM among them, may reorder them: there both sides pass a barrier, namely a lock that
they hold all the time and release and take again (a release, then an acquire, on one location).

Reading has two marks: ``read`` moves a private position, ``commit`` publishes it as ``tail``. A
reader that dies between the two starts again at ``tail``: records are seen at least once.
"""

import contextlib
import enum
import mmap
import os
import platform
import struct
import threading
from pathlib import Path
from typing import Final

from pageframe.core.errors import InternalError
from pageframe.core.trace import TraceMode
from pageframe.telemetry.process import ProcessIdentity
from pageframe.telemetry.ring_file import map_new_file, open_exclusively

CAPACITY_BYTES_DEFAULT: Final = 16 * 1024 * 1024
CAPACITY_BYTES_MIN: Final = 1024
ALIGNMENT_BYTES: Final = 8
RECORD_HEADER: Final = struct.Struct("<IH2x")

_MAGIC: Final = int.from_bytes(b"PFRING01", "little")
_HEADER_BYTES: Final = 4096
_SERVICE_NAME_OFFSET: Final = 64
_SERVICE_NAME_BYTES_MAX: Final = 64
_MODES: Final = tuple(TraceMode)
_IS_STRONGLY_ORDERED: Final = platform.machine() in {"x86_64", "AMD64", "i686"}


@enum.unique
class RecordKind(enum.IntEnum):
    """What a record holds. The numbers stay: a spool may hold what an older version recorded."""

    PAD = 0
    KV = 1
    # 2 was a span whose attributes were JSON.
    SPAN = 3


class _Word(enum.IntEnum):
    """Index of each 8-byte word of the header. Producer and reader own a cache line each."""

    MAGIC = 0
    CAPACITY = 1
    PRODUCER_PID = 2
    PRODUCER_START_TICKS = 3
    INCARNATION = 4
    MODE = 5
    SERVICE_NAME_BYTES = 6
    HEAD = 16
    DROPPED = 17
    CLOSED = 18
    TAIL = 24
    DROPPED_REPORTED = 25


# Plain integers for the hot path: looking up an enum member costs as much as the store itself.
_HEAD: Final = int(_Word.HEAD)
_TAIL: Final = int(_Word.TAIL)
_DROPPED: Final = int(_Word.DROPPED)
_PAD: Final = int(RecordKind.PAD)
_RECORD_BYTES_MIN: Final = RECORD_HEADER.size


class _Barrier:
    """Orders memory accesses before it ahead of those after it, on any machine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        self._lock.release()
        self._lock.acquire()


def record_bytes_max(capacity_bytes: int) -> int:
    """Largest record that a ring takes: with its padding it always fits into an empty ring."""
    return capacity_bytes // 4


class RingWriter:
    """The producer's side; used from one thread at a time.

    A record is packed where it will be read, without a copy in between::

        if ring.offset + num_bytes <= ring.room_end or ring.make_room(num_bytes):
            layout.pack_into(ring.memory, ring.offset, ...)
            ring.publish(num_bytes)

    Attributes:
        capacity_bytes: Room for records, a power of two.
        incarnation: Names this run of the producer; in ``[1, 2**63)``.
        path: Where the ring lies.
        memory: The mapped file.
        offset: Where in ``memory`` the next record begins.
        room_end: As far as ``memory`` is known to be free from there; ``make_room`` may move it.
    """

    def __init__(
        self,
        path: Path,
        *,
        service_name: str,
        mode: TraceMode,
        incarnation: int,
        capacity_bytes: int = CAPACITY_BYTES_DEFAULT,
    ) -> None:
        """Make a fresh ring at ``path``; one that is there already is replaced as a whole.

        ``capacity_bytes`` is rounded up to a power of two.

        Raises:
            ResourceExhaustedError: ``RING_NO_ROOM``, if the folder has no room for it.
            OSError: if the folder is not there or not writable.
        """
        name = service_name.encode()
        assert len(name) <= _SERVICE_NAME_BYTES_MAX, f"service name of {len(name)} bytes"
        assert 0 < incarnation < 1 << 63, f"incarnation {incarnation} is no positive int64"
        self.path = path
        self.incarnation = incarnation
        self.capacity_bytes = 1 << (max(capacity_bytes, CAPACITY_BYTES_MIN) - 1).bit_length()
        self._head = 0
        self.offset = _HEADER_BYTES
        self.room_end = _HEADER_BYTES + self.capacity_bytes
        self._barrier = None if _IS_STRONGLY_ORDERED else _Barrier()
        # Readers must never see half a header: fill a file of another name, then rename it.
        draft = path.with_name(f"{path.name}.{os.getpid()}.new")
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        self.memory = map_new_file(draft, _HEADER_BYTES + self.capacity_bytes)
        self._words = memoryview(self.memory)[:_HEADER_BYTES].cast("Q")
        producer = ProcessIdentity.current()
        self._words[_Word.CAPACITY] = self.capacity_bytes
        self._words[_Word.PRODUCER_PID] = producer.pid
        self._words[_Word.PRODUCER_START_TICKS] = producer.start_ticks
        self._words[_Word.INCARNATION] = incarnation
        self._words[_Word.MODE] = _MODES.index(mode)
        self._words[_Word.SERVICE_NAME_BYTES] = len(name)
        self.memory[_SERVICE_NAME_OFFSET : _SERVICE_NAME_OFFSET + len(name)] = name
        self._words[_Word.MAGIC] = _MAGIC
        draft.rename(path)

    def make_room(self, num_bytes: int) -> bool:
        """Find room for a record that does not fit before ``room_end``.

        Looks how far the reader has come, and goes to the front when the end of the memory is
        too near. ``num_bytes`` is a multiple of 8, at most ``record_bytes_max(capacity_bytes)``.

        Returns:
            Whether there is room at ``offset`` now; when not, nothing has changed.
        """
        mask = self.capacity_bytes - 1
        place = self._head & mask
        padding = self.capacity_bytes - place if place + num_bytes > self.capacity_bytes else 0
        # How far `head` may go, by a `tail` that may be old; it only moves on, so this is safe.
        head_max = self._words[_TAIL] + self.capacity_bytes
        if self._head + padding + num_bytes > head_max:
            return False
        if self._barrier is not None:
            self._barrier()
        if padding:
            RECORD_HEADER.pack_into(self.memory, self.offset, padding, RecordKind.PAD)
            self._head += padding  # Readers see it together with the record that follows.
        self.offset = _HEADER_BYTES + (self._head & mask)
        num_bytes_free = min(head_max - self._head, self.capacity_bytes)
        self.room_end = min(self.offset + num_bytes_free, _HEADER_BYTES + self.capacity_bytes)
        return True

    def publish(self, num_bytes: int) -> None:
        """Let the reader see the ``num_bytes`` that were packed at ``offset``."""
        if self._barrier is not None:
            self._barrier()
        self.offset += num_bytes
        self._words[_HEAD] = self._head = self._head + num_bytes

    def try_write(self, record: bytes) -> bool:
        """Append one record, header included; False, and nothing changed, when there is no room.

        ``record`` has a multiple of 8 bytes, at most ``record_bytes_max(capacity_bytes)``.
        """
        num_bytes = len(record)
        if self.offset + num_bytes > self.room_end and not self.make_room(num_bytes):
            return False
        self.memory[self.offset : self.offset + num_bytes] = record
        self.publish(num_bytes)
        return True

    @property
    def num_dropped(self) -> int:
        """Records that were not written because there was no room."""
        return self._words[_DROPPED]

    def count_dropped(self) -> None:
        """Count one record that was not written."""
        self._words[_DROPPED] += 1

    @property
    def tail(self) -> int:
        """Bytes that the reader has consumed so far."""
        return self._words[_TAIL]

    def close(self) -> None:
        """Say that no record will follow, and let go of the memory. The file stays."""
        if self.memory.closed:
            return
        self._words[_Word.CLOSED] = 1
        self._words.release()
        self.memory.close()


class RingReader:
    """The consumer's side; one at a time, which a lock on the file enforces.

    Attributes:
        path: Where the ring was found.
        service_name: The producer's.
        mode: How much it traces.
        incarnation: Names this run of the producer.
        capacity_bytes: Room for records.
        producer: The process that writes.
    """

    def __init__(self, path: Path) -> None:
        """Attach where the last reader committed.

        Raises:
            NotFoundError: if there is no ring at ``path``.
            UnavailableError: if another reader is attached.
            InternalError: if the file is no ring of this version.
        """
        self.path = path
        self._file = open_exclusively(path)
        num_bytes = os.fstat(self._file).st_size
        if num_bytes < _HEADER_BYTES:
            os.close(self._file)
            raise InternalError("RING_MALFORMED", f"{path} has {num_bytes} bytes, less than a ring")
        self._map = mmap.mmap(self._file, num_bytes)
        self._barrier = None if _IS_STRONGLY_ORDERED else _Barrier()
        self._words = memoryview(self._map)[:_HEADER_BYTES].cast("Q")
        self.capacity_bytes = self._words[_Word.CAPACITY]
        if (
            self._words[_Word.MAGIC] != _MAGIC
            or len(self._map) != _HEADER_BYTES + self.capacity_bytes
        ):
            self.close()
            raise InternalError("RING_MALFORMED", f"{path} is not a ring of this version")
        self.producer = ProcessIdentity(
            self._words[_Word.PRODUCER_PID], self._words[_Word.PRODUCER_START_TICKS]
        )
        self.incarnation = self._words[_Word.INCARNATION]
        self.mode = _MODES[self._words[_Word.MODE]]
        name_end = _SERVICE_NAME_OFFSET + self._words[_Word.SERVICE_NAME_BYTES]
        self.service_name = self._map[_SERVICE_NAME_OFFSET:name_end].decode()
        self._position = self._words[_TAIL]

    def read(self, num_bytes_max: int) -> tuple[bytes, int]:
        """Records not read yet, oldest first, one after the other; and how many they are.

        Stops after the record with which ``num_bytes_max`` is reached, and at the end of the
        memory, where padding may come last; that is no record. There is none only when nothing
        waits. ``commit`` must follow once the records are safe elsewhere.

        Raises:
            InternalError: if the ring holds what no producer writes. What was waiting is skipped.
        """
        head = self._words[_HEAD]
        if self._barrier is not None:
            self._barrier()
        memory, header_of = self._map, RECORD_HEADER.unpack_from
        offset = self._position & (self.capacity_bytes - 1)
        at = start = _HEADER_BYTES + offset
        end = start + min(head - self._position, self.capacity_bytes - offset)
        enough = min(end, start + num_bytes_max)
        num_records = 0
        while at < enough:
            length, kind = header_of(memory, at)
            if length < _RECORD_BYTES_MIN or length % ALIGNMENT_BYTES or at + length > end:
                if at > start:
                    break  # Hand out what is sound; the next call finds this again.
                at, self._position = self._position, head
                raise InternalError(
                    "RING_CORRUPT",
                    f"{self.path} has a record of {length} bytes at {at}, head {head}",
                )
            at += length
            num_records += kind != _PAD
        self._position += at - start
        if at > start and not num_records:
            return self.read(num_bytes_max)  # Nothing but padding; go on at the front.
        return memory[start:at], num_records

    def commit(self) -> None:
        """Give everything read so far back to the producer as free room."""
        if self._barrier is not None:
            self._barrier()
        self._words[_TAIL] = self._position

    @property
    def num_bytes_waiting(self) -> int:
        """Bytes written and not read yet."""
        return self._words[_HEAD] - self._position

    @property
    def num_bytes_uncommitted(self) -> int:
        """Bytes read and not committed yet."""
        return self._position - self._words[_TAIL]

    @property
    def num_dropped(self) -> int:
        """Records that the producer could not write."""
        return self._words[_DROPPED]

    @property
    def num_dropped_reported(self) -> int:
        """How many drops a span has told of; kept here so a new reader tells none twice."""
        return self._words[_Word.DROPPED_REPORTED]

    @num_dropped_reported.setter
    def num_dropped_reported(self, number: int) -> None:
        self._words[_Word.DROPPED_REPORTED] = number

    def is_producer_gone(self) -> bool:
        """Whether no record will follow: the producer closed the ring or died."""
        return bool(self._words[_Word.CLOSED]) or not self.producer.is_alive()

    def is_replaced(self) -> bool:
        """Whether another ring, or nothing, lies at the path by now."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return True
        mine = os.fstat(self._file)
        return (found.st_dev, found.st_ino) != (mine.st_dev, mine.st_ino)

    def close(self) -> None:
        """Detach; what is not committed will be read again by the next reader."""
        if self._map.closed:
            return
        self._words.release()
        self._map.close()
        os.close(self._file)
