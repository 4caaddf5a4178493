"""Spool, sender and what the environment chooses: nothing is lost quietly, all is bounded."""

import itertools
import threading

import pytest

from pageframe.telemetry.batch_encoder import BatchEncoder
from pageframe.telemetry.client import OtlpClient
from pageframe.telemetry.destinations import (
    NowhereDestination,
    SpooledDestination,
    choose_destination,
)
from pageframe.telemetry.json_form import JsonForm
from pageframe.telemetry.sender import Sender
from pageframe.telemetry.span_records import pack_span
from pageframe.telemetry.spool import Spool
from pageframe.telemetry.trace_files import TraceFiles
from unit.telemetry.records_of import make_batch
from unit.telemetry.spans_of_request import names_in

TIMEOUT_S = 20.0


def make_span(name):
    return pack_span(
        name,
        trace_id=bytes(range(16)),
        span_id=1,
        parent_span_id=0,
        start_ns=1,
        end_ns=2,
        attributes={},
        links=(),
        error="",
    )


def make_spans(*names):
    return make_batch(*map(make_span, names))


class FakeCollector:
    """Stands for the client: up or away, and picky about some spans."""

    def __init__(self, is_up=True, refused=()):
        self.form = JsonForm()
        self.is_up = is_up
        self.refused = set(refused)
        self.taken: list[bytes] = []
        self.num_attempts = 0
        self.attempted = threading.Condition()
        self.is_closed = False

    def send(self, request):
        with self.attempted:
            self.num_attempts += 1
            self.attempted.notify_all()
        if not self.is_up or self.refused & set(names_in(request)):
            return False
        self.taken.append(request)
        return True

    def is_reachable(self):
        return self.is_up

    def close(self):
        self.is_closed = True

    @property
    def names(self):
        return [name for request in self.taken for name in names_in(request)]

    def wait_for_attempts(self, number):
        with self.attempted:
            assert self.attempted.wait_for(lambda: self.num_attempts >= number, TIMEOUT_S)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("pageframe.telemetry.sender._BACKOFF_S_MAX", 0.001)
    monkeypatch.setattr("pageframe.telemetry.sender._BACKOFF_S_MIN", 0.001)


def test_the_spool_is_first_in_first_out_and_survives_its_process(tmp_path):
    first = Spool(tmp_path)
    assert first.put(b"one", 1)
    assert first.put(b"two", 2)
    second = Spool(tmp_path)
    assert (len(second), second.num_records) == (2, 3)
    for content in (b"one", b"two"):
        entry = second.oldest(0)
        assert entry.path.read_bytes() == content
        second.remove(entry)
    assert second.oldest(0) is None
    assert list(tmp_path.iterdir()) == []


def test_a_full_spool_takes_no_more_until_something_leaves(tmp_path):
    spool = Spool(tmp_path, num_bytes_max=10)
    assert spool.put(b"12345678", 1)
    assert not spool.put(b"123", 1)
    spool.remove(spool.oldest(0))
    assert spool.put(b"123", 1)


def test_a_draft_left_by_a_kill_is_not_taken_for_a_batch(tmp_path):
    (tmp_path / "1-1-1-1.new").write_bytes(b"half")
    assert len(Spool(tmp_path)) == 0


def test_a_collector_that_comes_back_gets_everything_once_and_in_order(tmp_path):
    collector = FakeCollector(is_up=False)
    destination = SpooledDestination(tmp_path, collector)
    for name in ("one", "two", "three"):
        assert destination.deliver(make_spans(name))
    collector.wait_for_attempts(2)
    assert collector.taken == []
    collector.is_up = True
    collector.wait_for_attempts(5)
    destination.close(TIMEOUT_S)
    assert collector.names == ["one", "two", "three"]
    assert destination.num_dropped == 0
    assert collector.is_closed
    assert list(tmp_path.iterdir()) == []


def test_closing_while_the_collector_is_away_keeps_the_spool_for_the_next_start(tmp_path):
    destination = SpooledDestination(tmp_path, FakeCollector(is_up=False))
    destination.deliver(make_spans("one", "two"))
    destination.close(TIMEOUT_S)
    back = FakeCollector()
    SpooledDestination(tmp_path, back).close(TIMEOUT_S)
    assert back.names == ["one", "two"]


def test_records_that_do_not_fit_into_the_spool_are_counted(tmp_path):
    batch = make_spans("one", "two", "three")
    destination = SpooledDestination(
        tmp_path, FakeCollector(is_up=False), spool_bytes_max=2 * len(batch.pack())
    )
    assert [destination.deliver(batch) for _ in range(4)] == [True, True, False, False]
    assert destination.num_dropped == 6
    assert not destination.has_room(1)
    destination.close(TIMEOUT_S)


def test_a_request_that_a_present_collector_never_takes_is_dropped_and_the_next_sent(
    tmp_path, impatient
):
    collector = FakeCollector(refused={"poison"})
    spool = Spool(tmp_path)
    for names in (("poison", "beside"), ("good",)):
        spool.put(make_spans(*names).pack(), len(names))
    sender = Sender(spool, collector)
    collector.wait_for_attempts(9)
    sender.close(TIMEOUT_S)
    assert collector.names == ["good"]
    assert sender.num_spans_dropped == 2
    assert len(spool) == 0


def test_a_refused_request_is_tried_again_without_those_before_it(tmp_path, impatient, monkeypatch):
    # One span a request.
    monkeypatch.setattr(BatchEncoder.__init__, "__defaults__", (1,))
    collector = FakeCollector(refused={"late"})
    spool = Spool(tmp_path)
    spool.put(make_spans("early", "late", "last").pack(), 3)
    sender = Sender(spool, collector)
    collector.wait_for_attempts(4)
    collector.refused = set()
    sender.close(TIMEOUT_S)
    assert collector.names == ["early", "late", "last"]
    assert [len(names_in(request)) for request in collector.taken] == [1, 1, 1]


@pytest.mark.parametrize("num_bytes_left", [0, 20, 300])
def test_a_batch_that_was_cut_off_is_counted_and_what_is_whole_is_sent(tmp_path, num_bytes_left):
    spool = Spool(tmp_path)
    spool.put(make_spans("one", "two", "three").pack(), 3)
    spool.put(make_spans("next").pack(), 1)
    damaged = min(tmp_path.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:num_bytes_left])
    collector = FakeCollector()
    sender = Sender(spool, collector)
    sender.close(TIMEOUT_S)
    assert collector.names[-1] == "next"
    num_whole = len(collector.names) - 1
    assert collector.names[:num_whole] == ["one", "two", "three"][:num_whole]
    assert sender.num_spans_dropped == 3 - num_whole > 0
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_another_exporter_has_sent_is_passed_over(tmp_path):
    spool = Spool(tmp_path)
    spool.put(make_spans("gone").pack(), 1)
    spool.put(make_spans("here").pack(), 1)
    min(tmp_path.iterdir()).unlink()
    collector = FakeCollector()
    sender = Sender(spool, collector)
    sender.close(TIMEOUT_S)
    assert (collector.names, sender.num_spans_dropped) == (["here"], 0)


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, TraceFiles),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, OtlpClient),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, OtlpClient),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            },
            TraceFiles,
        ),
    ],
)
def test_the_standard_variables_choose_the_destination(tmp_path, environment, kind):
    destination = choose_destination(tmp_path, "pageframe", environment=environment)
    assert isinstance(destination, SpooledDestination)
    assert isinstance(destination._sender._client, kind)
    destination.close(TIMEOUT_S)


@pytest.mark.parametrize(
    "environment", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}]
)
def test_the_standard_variables_turn_everything_off(tmp_path, environment):
    destination = choose_destination(tmp_path, "pageframe", environment=environment)
    assert isinstance(destination, NowhereDestination)
    assert destination.deliver(make_spans("one"))
    assert (destination.num_dropped, list(tmp_path.iterdir())) == (0, [])


def test_the_bound_of_the_spool_can_be_set(tmp_path):
    destination = choose_destination(tmp_path, "pageframe", spool_bytes_max=1000, environment={})
    assert [destination.has_room(num_bytes) for num_bytes in (1000, 1001)] == [True, False]
    destination.close(TIMEOUT_S)


def test_many_batches_pass_in_order_while_they_are_put(tmp_path):
    collector = FakeCollector()
    destination = SpooledDestination(tmp_path, collector)
    for number in range(300):
        assert destination.deliver(make_spans(f"span-{number}"))
    destination.close(TIMEOUT_S)
    assert collector.names == [f"span-{number}" for number in range(300)]
    assert all(first != second for first, second in itertools.pairwise(collector.taken))
