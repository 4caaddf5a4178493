"""The ring: what is written is read, in order, once, whatever wraps, restarts or dies."""

import errno
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pageframe.core.errors import (
    InternalError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from pageframe.core.trace import TraceMode
from pageframe.telemetry.ring import (
    RECORD_HEADER,
    RecordKind,
    RingReader,
    RingWriter,
    record_bytes_max,
)
from unit.telemetry.records_of import read_packed, read_some


def make_writer(path: Path, capacity_bytes: int = 1024, incarnation: int = 7) -> RingWriter:
    return RingWriter(
        path,
        service_name="pageframe-executor",
        mode=TraceMode.ALL,
        incarnation=incarnation,
        capacity_bytes=capacity_bytes,
    )


def make_record(num_bytes: int, mark: int) -> bytes:
    header = RECORD_HEADER.pack(num_bytes, RecordKind.SPAN)
    return header + struct.pack("<Q", mark) + bytes(num_bytes - 16)


def test_a_reader_learns_who_writes(tmp_path):
    writer = make_writer(tmp_path / "ring", incarnation=42)
    reader = RingReader(tmp_path / "ring")
    assert reader.service_name == "pageframe-executor"
    assert reader.mode is TraceMode.ALL
    assert reader.incarnation == 42
    assert reader.capacity_bytes == 1024
    assert reader.producer.pid == os.getpid()
    assert not reader.is_producer_gone()
    writer.close()
    assert reader.is_producer_gone()


def test_capacity_is_rounded_up_to_a_power_of_two(tmp_path):
    assert make_writer(tmp_path / "ring", capacity_bytes=5000).capacity_bytes == 8192


def test_records_come_out_in_order_and_only_once(tmp_path):
    writer = make_writer(tmp_path / "ring")
    reader = RingReader(tmp_path / "ring")
    records = [make_record(24, mark) for mark in range(5)]
    assert all(writer.try_write(record) for record in records)
    assert read_packed(reader) == records
    assert read_packed(reader) == []


def test_a_reader_that_comes_late_finds_what_was_written_before(tmp_path):
    writer = make_writer(tmp_path / "ring")
    writer.try_write(make_record(32, 1))
    assert read_packed(RingReader(tmp_path / "ring")) == [make_record(32, 1)]


def test_reading_stops_once_enough_bytes_are_taken(tmp_path):
    writer = make_writer(tmp_path / "ring")
    reader = RingReader(tmp_path / "ring")
    for mark in range(4):
        writer.try_write(make_record(32, mark))
    assert len(read_some(reader, 33)) == 2
    assert reader.num_bytes_waiting == 64


def test_a_record_that_does_not_fit_before_the_end_starts_over_at_the_front(tmp_path):
    writer = make_writer(tmp_path / "ring")
    reader = RingReader(tmp_path / "ring")
    for mark in range(4):
        assert writer.try_write(make_record(240, mark))
    read_packed(reader)
    reader.commit()
    # 960 of 1024 bytes are used: 64 are left at the end, too few for 240.
    assert writer.try_write(make_record(240, 9))
    assert read_packed(reader) == [make_record(240, 9)]
    assert reader.num_bytes_uncommitted == 64 + 240


def test_one_call_reads_up_to_the_end_of_the_memory_and_counts_no_padding(tmp_path):
    writer = make_writer(tmp_path / "ring")
    reader = RingReader(tmp_path / "ring")
    for mark in range(4):
        assert writer.try_write(make_record(240, mark))
    reader.read(480)
    reader.commit()
    assert writer.try_write(make_record(240, 9))
    assert reader.read(1 << 20)[1] == 2
    assert reader.read(1 << 20) == (make_record(240, 9), 1)
    assert reader.read(1 << 20) == (b"", 0)


def test_a_call_that_meets_padding_first_goes_on_at_the_front(tmp_path):
    writer = make_writer(tmp_path / "ring")
    reader = RingReader(tmp_path / "ring")
    for mark in range(4):
        assert writer.try_write(make_record(240, mark))
    reader.read(1 << 20)
    reader.commit()
    assert writer.try_write(make_record(240, 9))
    assert reader.read(1 << 20) == (make_record(240, 9), 1)


def test_a_machine_that_reorders_memory_accesses_is_given_barriers(tmp_path, monkeypatch):
    monkeypatch.setattr("pageframe.telemetry.ring._IS_STRONGLY_ORDERED", False)
    writer = make_writer(tmp_path / "ring")
    reader = RingReader(tmp_path / "ring")
    crossed = {"writer": 0, "reader": 0}
    for name, side in (("writer", writer), ("reader", reader)):
        barrier = side._barrier

        def cross(name=name, barrier=barrier):
            crossed[name] += 1
            barrier()

        side._barrier = cross
    records = [make_record(240, mark) for mark in range(10)]
    found = []
    for record in records:
        assert writer.try_write(record)
        found += read_packed(reader)
        reader.commit()
    assert found == records
    # Before `head` moves, and after `tail` was looked at, which is once a lap at least.
    assert crossed["writer"] > len(records)
    # After `head` was looked at, and before `tail` moves.
    assert crossed["reader"] >= 2 * len(records)


def test_a_full_ring_takes_nothing_until_the_reader_commits(tmp_path):
    writer = make_writer(tmp_path / "ring")
    reader = RingReader(tmp_path / "ring")
    for mark in range(4):
        assert writer.try_write(make_record(256, mark))
    assert not writer.try_write(make_record(16, 4))
    read_packed(reader)
    assert not writer.try_write(make_record(16, 4))
    reader.commit()
    assert writer.try_write(make_record(16, 4))
    assert read_packed(reader) == [make_record(16, 4)]


def test_a_reader_that_died_before_committing_is_followed_by_one_that_reads_again(tmp_path):
    writer = make_writer(tmp_path / "ring")
    for mark in range(3):
        writer.try_write(make_record(24, mark))
    first = RingReader(tmp_path / "ring")
    first.read(24)
    first.commit()
    read_packed(first)
    first.close()
    second = RingReader(tmp_path / "ring")
    assert read_packed(second) == [make_record(24, 1), make_record(24, 2)]


def test_what_a_reader_must_remember_survives_it(tmp_path):
    make_writer(tmp_path / "ring")
    first = RingReader(tmp_path / "ring")
    first.num_dropped_reported = 3
    first.close()
    second = RingReader(tmp_path / "ring")
    assert second.num_dropped_reported == 3


def test_a_second_reader_is_refused_while_the_first_is_attached(tmp_path):
    make_writer(tmp_path / "ring")
    first = RingReader(tmp_path / "ring")
    with pytest.raises(UnavailableError, match="RING_HAS_READER"):
        RingReader(tmp_path / "ring")
    first.close()
    RingReader(tmp_path / "ring").close()


def test_a_new_ring_replaces_the_old_one_which_stays_readable(tmp_path):
    old_writer = make_writer(tmp_path / "ring", incarnation=1)
    old_writer.try_write(make_record(24, 1))
    old = RingReader(tmp_path / "ring")
    assert not old.is_replaced()
    make_writer(tmp_path / "ring", incarnation=2)
    assert old.is_replaced()
    assert read_packed(old) == [make_record(24, 1)]
    assert RingReader(tmp_path / "ring").incarnation == 2


def test_no_draft_is_left_behind(tmp_path):
    make_writer(tmp_path / "ring")
    assert [path.name for path in tmp_path.iterdir()] == ["ring"]


def test_nothing_at_the_path_is_an_error_that_names_it(tmp_path):
    with pytest.raises(NotFoundError, match="no-ring-here"):
        RingReader(tmp_path / "no-ring-here")


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 4096, bytes(8192)])
def test_a_file_that_is_no_ring_is_refused(tmp_path, content):
    (tmp_path / "ring").write_bytes(content)
    with pytest.raises(InternalError, match="RING_MALFORMED"):
        RingReader(tmp_path / "ring")


@pytest.mark.parametrize("length", [0, 12, 4096])
def test_a_broken_record_is_reported_and_what_follows_later_is_read(tmp_path, length):
    writer = make_writer(tmp_path / "ring")
    reader = RingReader(tmp_path / "ring")
    writer.try_write(RECORD_HEADER.pack(length, RecordKind.SPAN) + bytes(16))
    with pytest.raises(InternalError, match="RING_CORRUPT"):
        read_packed(reader)
    writer.try_write(make_record(24, 5))
    assert read_packed(reader) == [make_record(24, 5)]


def test_what_is_sound_before_a_broken_record_is_read_first(tmp_path):
    writer = make_writer(tmp_path / "ring")
    reader = RingReader(tmp_path / "ring")
    writer.try_write(make_record(24, 4))
    writer.try_write(RECORD_HEADER.pack(12, RecordKind.SPAN) + bytes(16))
    assert reader.read(1 << 20) == (make_record(24, 4), 1)
    with pytest.raises(InternalError, match="RING_CORRUPT"):
        reader.read(1 << 20)


def test_a_ring_that_memory_has_no_room_for_is_an_error_that_says_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ResourceExhaustedError, match="RING_NO_ROOM") as raised:
        make_writer(tmp_path / "ring")
    assert raised.value.limits == {"num_ring_bytes": "5120"}
    assert list(tmp_path.iterdir()) == []


def test_the_death_of_the_producer_is_seen_and_its_last_record_read(tmp_path):
    program = (
        "import sys, time; from pathlib import Path\n"
        "from pageframe.core.trace import TraceMode\n"
        "from pageframe.telemetry.ring import RingWriter\n"
        f"ring = RingWriter(Path({str(tmp_path / 'ring')!r}), service_name='s',"
        " mode=TraceMode.ALL, incarnation=1)\n"
        f"ring.try_write({make_record(24, 3)!r})\n"
        "print('written', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"written\n"
    reader = RingReader(tmp_path / "ring")
    assert reader.producer.pid == child.pid
    assert not reader.is_producer_gone()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert reader.is_producer_gone()
    assert read_packed(reader) == [make_record(24, 3)]


class RingMachine(RuleBasedStateMachine):
    """The ring against a list: written records wait in order until they are committed."""

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(f"/dev/shm/pageframe-test-{os.getpid()}-{id(self)}.ring")
        self.writer = make_writer(self.path)
        self.reader = RingReader(self.path)
        self.uncommitted: list[bytes] = []
        self.waiting: list[bytes] = []
        self.num_written = 0

    @rule(num_words=st.integers(2, 32))
    def write(self, num_words: int) -> None:
        record = make_record(8 * num_words, self.num_written)
        num_bytes_held = sum(map(len, self.waiting + self.uncommitted))
        if self.writer.try_write(record):
            self.num_written += 1
            self.waiting.append(record)
        else:
            # Padding at most doubles a record's need; below that there must be room.
            assert num_bytes_held + 4 * len(record) > 1024 - record_bytes_max(1024)

    @rule(num_bytes=st.integers(1, 400))
    def read(self, num_bytes: int) -> None:
        records = read_some(self.reader, num_bytes)
        assert records == self.waiting[: len(records)]
        assert bool(records) == bool(self.waiting)
        self.uncommitted += records
        self.waiting = self.waiting[len(records) :]

    @rule()
    def commit(self) -> None:
        self.reader.commit()
        self.uncommitted = []

    @rule()
    def restart_reader(self) -> None:
        self.reader.close()
        self.reader = RingReader(self.path)
        self.waiting = self.uncommitted + self.waiting
        self.uncommitted = []

    @precondition(lambda self: not self.waiting and not self.uncommitted)
    @rule()
    def an_empty_ring_takes_the_largest_record(self) -> None:
        read_packed(self.reader)
        self.reader.commit()
        record = make_record(record_bytes_max(1024), self.num_written)
        assert self.writer.try_write(record)
        self.num_written += 1
        self.waiting.append(record)

    @invariant()
    def no_more_is_held_than_the_ring_has_room_for(self) -> None:
        held = self.reader.num_bytes_waiting + self.reader.num_bytes_uncommitted
        assert sum(map(len, self.waiting + self.uncommitted)) <= held <= 1024

    def teardown(self) -> None:
        assert read_packed(self.reader) == self.waiting
        self.reader.close()
        self.writer.close()
        self.path.unlink()


TestRingMachine = RingMachine.TestCase
TestRingMachine.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, print_blob=True
)
