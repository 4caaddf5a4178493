"""The exporter's loop in one process: commit after delivery, restarts, replaced rings, drops."""

import pytest

from pageframe.core.trace import KvCause, KvOperation, TraceMode
from pageframe.telemetry.exporter import Exporter
from pageframe.telemetry.records import unpack
from pageframe.telemetry.ring import RingReader
from pageframe.telemetry.sink import RingTraceSink

SECOND_NS = 1_000_000_000


class ListDestination:
    """Keeps batches, and reads in them."""

    def __init__(self):
        self.batches = []
        self.num_dropped = 0
        self.room = True
        self.closed_with_s = None
        self.on_deliver = lambda _: None

    def has_room(self, num_bytes):
        return self.room

    def deliver(self, batch):
        self.on_deliver(batch)
        if not self.room:
            self.num_dropped += batch.num_records
            return False
        self.batches.append(batch)
        return True

    def close(self, timeout_s):
        self.closed_with_s = timeout_s

    @property
    def operations(self):
        return [
            unpack(batch.records[start:end]).number
            for batch in self.batches
            for start, end, _ in batch.each_record()
        ]

    @property
    def losses(self):
        return [tuple(loss) for batch in self.batches for loss in batch.losses]


class Time:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now_ns = SECOND_NS

    def __call__(self):
        return self.now_ns

    def advance(self):
        self.now_ns += 2 * SECOND_NS


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ring"


@pytest.fixture
def destination():
    return ListDestination()


@pytest.fixture
def time():
    return Time()


def make_sink(path, mode=TraceMode.ALL, capacity_bytes=4096, incarnation=1):
    return RingTraceSink.create(
        path,
        "pageframe-executor",
        mode,
        capacity_bytes=capacity_bytes,
        incarnation=incarnation,
    )


def record_kv(sink, times=1):
    for _ in range(times):
        sink.kv(
            KvOperation.ALLOCATE,
            KvCause.DECODE,
            sequence_id=0,
            generation=0,
            position=0,
            step=1,
            block_ids=[1],
            num_free_after=9,
        )


def test_records_wait_for_company_but_not_long(path, destination, time):
    sink = make_sink(path)
    exporter = Exporter([path], destination, now_ns=time)
    record_kv(sink)
    assert exporter.run_pass() == 0
    time.advance()
    assert exporter.run_pass() == 1
    assert destination.operations == [1]


def test_when_something_has_waited_in_one_ring_all_are_emptied(tmp_path, destination, time):
    sinks = [make_sink(tmp_path / name) for name in ("a", "b", "c")]
    exporter = Exporter([tmp_path / name for name in ("a", "b", "c")], destination, now_ns=time)
    record_kv(sinks[0])
    assert exporter.run_pass() == 0
    time.now_ns += SECOND_NS - 1
    record_kv(sinks[1], times=2)
    assert exporter.run_pass() == 0
    time.now_ns += 1
    assert exporter.run_pass() == 3
    assert [batch.num_records for batch in destination.batches] == [1, 2]
    record_kv(sinks[2])
    assert exporter.run_pass() == 0


def test_a_crowded_ring_does_not_empty_the_others(tmp_path, destination, time):
    crowded, other = make_sink(tmp_path / "a"), make_sink(tmp_path / "b")
    exporter = Exporter([tmp_path / "a", tmp_path / "b"], destination, now_ns=time)
    record_kv(crowded, times=20)
    record_kv(other)
    assert exporter.run_pass() == 20


def test_a_crowded_ring_is_emptied_at_once(path, destination, time):
    sink = make_sink(path)
    exporter = Exporter([path], destination, now_ns=time)
    record_kv(sink, times=20)
    assert exporter.run_pass() == 20
    assert destination.operations == list(range(1, 21))


def test_a_large_ring_is_emptied_in_batches(path, destination, time):
    sink = make_sink(path, capacity_bytes=1 << 24)
    exporter = Exporter([path], destination, now_ns=time)
    record_kv(sink, times=20_000)
    while exporter.run_pass():
        pass
    assert destination.operations == list(range(1, 20_001))
    assert len(destination.batches) > 2
    assert all(len(batch.records) <= 512 * 1024 + 1024 for batch in destination.batches)


def test_ring_memory_is_given_back_only_after_delivery(path, destination, time):
    sink = make_sink(path)
    exporter = Exporter([path], destination, now_ns=time)
    record_kv(sink, times=20)
    tails = []
    destination.on_deliver = lambda _: tails.append(sink._ring.tail)
    exporter.run_pass()
    assert tails == [0]
    assert sink._ring.tail > 0


def test_an_exporter_killed_before_delivery_is_followed_by_one_that_delivers(
    path, destination, time
):
    sink = make_sink(path)

    def die(_):
        raise KeyboardInterrupt

    killed_destination = ListDestination()
    killed_destination.on_deliver = die
    killed = Exporter([path], killed_destination, now_ns=time)
    record_kv(sink, times=20)
    with pytest.raises(KeyboardInterrupt):
        killed.run_pass()
    for source in killed._sources:
        source._reader.close()
    second = Exporter([path], destination, now_ns=time)
    second.run_pass()
    assert destination.operations == list(range(1, 21))


def test_a_ring_made_later_is_found(path, destination, time):
    exporter = Exporter([path], destination, now_ns=time)
    assert exporter.run_pass() == 0
    sink = make_sink(path)
    record_kv(sink, times=20)
    assert exporter.run_pass() == 0
    time.advance()
    assert exporter.run_pass() == 20


def test_a_restarted_service_is_followed_to_its_new_ring_after_the_old_is_read_out(
    path, destination, time
):
    first = make_sink(path, incarnation=1)
    exporter = Exporter([path], destination, now_ns=time)
    exporter.run_pass()
    record_kv(first, times=2)
    second = make_sink(path, incarnation=2)
    record_kv(second)
    for _ in range(6):
        time.advance()
        exporter.run_pass()
    found = [(batch.producer.incarnation, batch.num_records) for batch in destination.batches]
    assert found == [(1, 2), (2, 1)]
    assert destination.operations == [1, 2, 1]


def test_drops_are_told_once_with_their_number(path, destination, time):
    sink = make_sink(path)
    exporter = Exporter([path], destination, now_ns=time)
    record_kv(sink, times=100)
    exporter.run_pass()
    num_dropped = sink.num_dropped
    assert destination.losses == [("ring", num_dropped, num_dropped)]
    assert num_dropped == 100 - len(destination.operations) > 0
    record_kv(sink, times=20)
    # The memory ends in between: two batches, each after a while.
    for _ in range(4):
        time.advance()
        exporter.run_pass()
    assert len(destination.losses) == 1
    assert destination.operations[-20:] == list(range(101, 121))


def test_drops_are_told_once_a_second_while_they_go_on_and_all_of_them_in_the_end(
    path, destination, time
):
    sink = make_sink(path)
    exporter = Exporter([path], destination, now_ns=time)
    for _ in range(3):
        record_kv(sink, times=100)
        exporter.run_pass()
    assert [loss[0] for loss in destination.losses] == ["ring"]
    exporter.drain(5.0, until_finished=False)
    assert sum(loss[1] for loss in destination.losses) == sink.num_dropped
    assert destination.losses[-1][2] == sink.num_dropped


def test_drops_that_no_record_follows_are_told(path, destination, time):
    sink = make_sink(path)
    exporter = Exporter([path], destination, now_ns=time)
    sink._ring.count_dropped()
    exporter.run_pass()
    assert (destination.operations, destination.losses) == ([], [("ring", 1, 1)])
    exporter.run_pass()
    assert len(destination.batches) == 1


def test_losses_behind_the_ring_are_told_when_there_is_room_again(path, destination, time):
    sink = make_sink(path)
    exporter = Exporter([path], destination, now_ns=time)
    destination.room = False
    record_kv(sink, times=20)
    assert exporter.run_pass() == 20
    destination.room = True
    record_kv(sink, times=20)
    assert exporter.run_pass() == 20
    assert destination.losses == [("exporter", 20, 20)]
    assert destination.operations == list(range(21, 41))
    record_kv(sink, times=20)
    exporter.run_pass()
    assert len(destination.losses) == 1


def test_under_audit_a_full_destination_leaves_records_in_the_ring(path, destination, time):
    sink = make_sink(path, mode=TraceMode.AUDIT)
    exporter = Exporter([path], destination, now_ns=time)
    record_kv(sink, times=20)
    destination.room = False
    assert exporter.run_pass() == 0
    destination.room = True
    assert exporter.run_pass() == 20
    assert destination.operations == list(range(1, 21))


def test_draining_delivers_everything_and_removes_rings_of_ended_services(
    path, destination, time, tmp_path
):
    other = tmp_path / "other"
    ended, living = make_sink(path), make_sink(other)
    record_kv(ended, times=3)
    record_kv(living, times=2)
    ended.close()
    exporter = Exporter([path, other], destination, now_ns=time)
    exporter.drain(5.0, until_finished=False)
    assert sorted(destination.operations) == [1, 1, 2, 2, 3]
    assert not path.exists()
    assert other.exists()
    assert 0 < destination.closed_with_s <= 5.0
    assert RingReader(other).read(1 << 30) == (b"", 0)


def test_a_ring_read_by_another_process_is_waited_for(path, destination, time):
    sink = make_sink(path)
    record_kv(sink, times=20)
    other = RingReader(path)
    exporter = Exporter([path], destination, now_ns=time)
    assert exporter.run_pass() == 0
    other.close()
    time.advance()
    assert exporter.run_pass() == 20
