"""The exporter's loop in one process: commit after delivery, restarts, replaced rings, drops."""

import json

import pytest

from pageframe.core.trace import KvCause, KvOperation, TraceMode
from pageframe.telemetry.exporter import Exporter
from pageframe.telemetry.json_form import JsonForm
from pageframe.telemetry.reader import spans_of
from pageframe.telemetry.ring import RECORD_HEADER, RingReader, RingWriter
from pageframe.telemetry.sink import RingTraceSink

SECOND_NS = 1_000_000_000


class ListDestination:
    """Keeps spans in a list."""

    def __init__(self):
        self.form = JsonForm()
        self.spans = []
        self.num_spans_dropped = 0
        self.room = True
        self.closed_with_s = None
        self.on_deliver = lambda _: None

    def has_room(self):
        return self.room

    def deliver(self, batch):
        self.on_deliver(batch)
        self.spans += spans_of(json.loads(self.form.request(batch.resource, batch.entries)))

    def close(self, timeout_s):
        self.closed_with_s = timeout_s

    @property
    def operations(self):
        return [
            span.attributes["kv.operation"] for span in self.spans if span.name == "kv.allocate"
        ]


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


def test_spans_wait_for_company_but_not_long(path, destination, time):
    sink = make_sink(path)
    exporter = Exporter([path], destination, now_ns=time)
    record_kv(sink)
    assert exporter.run_pass() == 1
    assert destination.spans == []
    time.advance()
    assert exporter.run_pass() == 0
    assert destination.operations == [1]


def test_a_crowded_ring_is_emptied_at_once(path, destination, time):
    sink = make_sink(path)
    exporter = Exporter([path], destination, now_ns=time)
    record_kv(sink, times=20)
    exporter.run_pass()
    assert destination.operations == list(range(1, 21))


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
    killed = Exporter([path], ListDestination(), now_ns=time)
    record_kv(sink, times=2)
    killed.run_pass()
    for source in killed._sources:
        source._reader.close()
    second = Exporter([path], destination, now_ns=time)
    second.run_pass()
    second.flush()
    assert destination.operations == [1, 2]


def test_a_ring_made_later_is_found(path, destination, time):
    exporter = Exporter([path], destination, now_ns=time)
    assert exporter.run_pass() == 0
    sink = make_sink(path)
    record_kv(sink)
    time.advance()
    assert exporter.run_pass() == 1


def test_a_restarted_service_is_followed_to_its_new_ring_after_the_old_is_read_out(
    path, destination, time
):
    first = make_sink(path, incarnation=1)
    exporter = Exporter([path], destination, now_ns=time)
    exporter.run_pass()
    record_kv(first, times=2)
    second = make_sink(path, incarnation=2)
    record_kv(second)
    while exporter.run_pass():
        pass
    time.advance()
    exporter.run_pass()
    exporter.flush()
    found = [
        (span.attributes["kv.pool_incarnation"], span.attributes["kv.operation"])
        for span in destination.spans
        if span.name == "kv.allocate"
    ]
    assert found == [(1, 1), (1, 2), (2, 1)]


def test_drops_are_told_once_with_their_number(path, destination, time):
    sink = make_sink(path)
    exporter = Exporter([path], destination, now_ns=time)
    record_kv(sink, times=100)
    exporter.run_pass()
    time.advance()
    exporter.run_pass()
    exporter.flush()
    (drop,) = [span for span in destination.spans if span.name == "trace.drop"]
    assert drop.attributes["pageframe.trace.num_dropped"] == sink.num_dropped > 0
    numbers = destination.operations
    record_kv(sink)
    exporter.run_pass()
    exporter.flush()
    assert destination.operations[-1] - numbers[-1] - 1 == sink.num_dropped


def test_losses_behind_the_ring_are_told_when_there_is_room_again(path, destination, time):
    sink = make_sink(path)
    exporter = Exporter([path], destination, now_ns=time)
    record_kv(sink)
    exporter.run_pass()
    destination.num_spans_dropped = 4
    destination.room = False
    exporter.flush()
    destination.room = True
    exporter.flush()
    exporter.flush()
    (drop,) = [span for span in destination.spans if span.name == "trace.drop"]
    assert drop.attributes["pageframe.trace.num_dropped"] == 4
    assert drop.attributes["pageframe.trace.dropped_by"] == "exporter"


def test_under_audit_a_full_destination_leaves_records_in_the_ring(path, destination, time):
    sink = make_sink(path, mode=TraceMode.AUDIT)
    exporter = Exporter([path], destination, now_ns=time)
    record_kv(sink, times=20)
    destination.room = False
    assert exporter.run_pass() == 0
    destination.room = True
    assert exporter.run_pass() == 20


def test_a_batch_that_cannot_be_delivered_does_not_stop_the_next(path, destination, time):
    sink = make_sink(path)
    exporter = Exporter([path], destination, now_ns=time)

    def fail(_):
        destination.on_deliver = lambda _: None
        raise RuntimeError("no room")

    destination.on_deliver = fail
    record_kv(sink)
    exporter.run_pass()
    exporter.flush()
    record_kv(sink)
    exporter.run_pass()
    exporter.flush()
    assert destination.operations == [2]
    (drop,) = [span for span in destination.spans if span.name == "trace.drop"]
    # The operation, and the root of the pool's own trace.
    assert drop.attributes["pageframe.trace.num_dropped"] == 2


def test_a_record_that_is_not_understood_is_passed_over(path, destination, time):
    ring = RingWriter(
        path, service_name="s", mode=TraceMode.ALL, incarnation=1, capacity_bytes=4096
    )
    ring.try_write(RECORD_HEADER.pack(16, 99) + bytes(8))
    sink = RingTraceSink(ring, mode=TraceMode.ALL)
    record_kv(sink)
    exporter = Exporter([path], destination, now_ns=time)
    assert exporter.run_pass() == 2
    exporter.flush()
    assert destination.operations == [1]
    exporter.flush()
    (drop,) = [span for span in destination.spans if span.name == "trace.drop"]
    assert drop.attributes["pageframe.trace.num_dropped"] == 1


def test_a_span_that_cannot_be_encoded_is_counted_and_its_neighbours_are_not(
    path, destination, time
):
    sink = make_sink(path)
    for name, link_span_id in (("before", 1), ("broken", 2**64), ("after", 1)):
        sink.span(
            name,
            trace_id=bytes(range(16)),
            span_id=3,
            parent_span_id=2,
            start_ns=1,
            end_ns=2,
            attributes={},
            links=[(bytes(16), link_span_id)],
        )
    exporter = Exporter([path], destination, now_ns=time)
    exporter.run_pass()
    exporter.flush()
    exporter.flush()
    names = [span.name for span in destination.spans]
    assert [name for name in names if name in {"before", "broken", "after"}] == ["before", "after"]
    (drop,) = [span for span in destination.spans if span.name == "trace.drop"]
    assert drop.attributes["pageframe.trace.num_dropped"] == 1


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
    assert RingReader(other).read(1 << 30) == []


def test_a_ring_read_by_another_process_is_waited_for(path, destination, time):
    sink = make_sink(path)
    record_kv(sink)
    other = RingReader(path)
    exporter = Exporter([path], destination, now_ns=time)
    assert exporter.run_pass() == 0
    other.close()
    time.advance()
    assert exporter.run_pass() == 1
