"""Files, spool and sender: nothing is lost quietly, everything is bounded."""

import json
import threading

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto_json.collector.trace.v1.trace_service import (
    ExportTraceServiceRequest as JsonExportTraceServiceRequest,
)

from pageframe.telemetry.destinations import (
    JsonLinesDestination,
    NowhereDestination,
    OtlpDestination,
    SpanBatch,
    choose_destination,
    split_into_requests,
)
from pageframe.telemetry.mapping import SpanMapper
from pageframe.telemetry.protobuf_form import ProtobufForm
from pageframe.telemetry.reader import read_spans
from pageframe.telemetry.records import SpanRecord
from pageframe.telemetry.sender import Sender
from pageframe.telemetry.spool import Spool

TIMEOUT_S = 20.0


def make_batch(form, num_spans, num_ids=1, first_span_id=1):
    mapper = SpanMapper(service_name="pageframe-executor", incarnation=1, producer_pid=1)
    spans = [
        mapper.spans(
            SpanRecord(
                name="kv.allocate",
                trace_id=bytes(15) + b"\1",
                span_id=first_span_id + index,
                parent_span_id=0,
                start_ns=index,
                end_ns=index,
                attributes={"kv.block_ids": list(range(num_ids))},
            )
        )[0]
        for index in range(num_spans)
    ]
    return SpanBatch(mapper.resource, form.spans(spans))


def deliver(destination, num_spans, **options):
    destination.deliver(make_batch(destination.form, num_spans, **options))


def span_ids_in(requests):
    return [
        int.from_bytes(span.span_id, "big")
        for request in requests
        for resource_spans in ExportTraceServiceRequest.FromString(request).resource_spans
        for scope_spans in resource_spans.scope_spans
        for span in scope_spans.spans
    ]


class FakeCollector:
    """Stands for the client: up or away, and picky about some requests."""

    def __init__(self, is_up=True, refused=()):
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
        if not request or request == b"malformed":
            raise ValueError("no request")
        if not self.is_up or request in self.refused:
            return False
        self.taken.append(request)
        return True

    def is_reachable(self):
        return self.is_up

    def close(self):
        self.is_closed = True

    def wait_for_attempts(self, number):
        with self.attempted:
            assert self.attempted.wait_for(lambda: self.num_attempts >= number, TIMEOUT_S)


def test_a_batch_is_one_request_while_it_is_small():
    form = ProtobufForm()
    ((request, num_spans),) = split_into_requests(form, make_batch(form, 10), 1 << 20)
    assert num_spans == 10
    assert span_ids_in([request]) == list(range(1, 11))


def test_a_large_batch_is_split_so_that_each_request_stays_under_the_bound():
    form = ProtobufForm()
    requests = list(split_into_requests(form, make_batch(form, 40, num_ids=500), 20_000))
    assert all(len(request) < 20_000 for request, _ in requests)
    assert [num for _, num in requests] == [len(span_ids_in([request])) for request, _ in requests]
    assert span_ids_in(request for request, _ in requests) == list(range(1, 41))


def test_a_single_span_keeps_its_complete_list_whatever_the_bound():
    form = ProtobufForm()
    ((request, _),) = split_into_requests(form, make_batch(form, 1, num_ids=5_000), 1_000)
    message = ExportTraceServiceRequest.FromString(request)
    (attribute,) = message.resource_spans[0].scope_spans[0].spans[0].attributes
    assert [value.int_value for value in attribute.value.array_value.values] == list(range(5_000))


def test_each_line_of_a_trace_file_is_an_export_request(tmp_path):
    destination = JsonLinesDestination(tmp_path, "pageframe")
    deliver(destination, 2)
    deliver(destination, 1, first_span_id=3)
    destination.close(1.0)
    lines = (tmp_path / "pageframe.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        request = JsonExportTraceServiceRequest.from_dict(json.loads(line))
        assert request.resource_spans[0].scope_spans[0].spans
    assert [span.span_id for span in read_spans(tmp_path)] == [1, 3, 2]


def test_a_line_torn_by_a_kill_is_cut_off_before_more_is_written(tmp_path):
    path = tmp_path / "pageframe.jsonl"
    destination = JsonLinesDestination(tmp_path, "pageframe")
    deliver(destination, 1)
    destination.close(1.0)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"resourceSpans":[' + b"x" * 100_000)
    destination = JsonLinesDestination(tmp_path, "pageframe")
    assert path.read_bytes() == whole
    deliver(destination, 1, first_span_id=2)
    destination.close(1.0)
    assert len(read_spans(path)) == 2


@pytest.mark.parametrize("content", [b"", b"torn"])
def test_a_file_without_any_whole_line_is_emptied(tmp_path, content):
    (tmp_path / "pageframe.jsonl").write_bytes(content)
    JsonLinesDestination(tmp_path, "pageframe").close(1.0)
    assert (tmp_path / "pageframe.jsonl").read_bytes() == b""


def test_full_files_are_put_aside_and_only_the_newest_kept(tmp_path):
    destination = JsonLinesDestination(tmp_path, "p", file_bytes_max=1, num_files_max=3)
    for span_id in range(1, 8):
        deliver(destination, 1, first_span_id=span_id)
    destination.close(1.0)
    assert len(list(tmp_path.glob("*.jsonl"))) == 3
    assert sorted(span.span_id for span in read_spans(tmp_path)) == [6, 7]


def test_a_file_that_cannot_be_written_counts_its_spans_as_dropped(tmp_path):
    destination = JsonLinesDestination(tmp_path, "p")
    destination._file.close()
    deliver(destination, 3)
    assert destination.num_spans_dropped == 3
    deliver(destination, 1, first_span_id=9)
    destination.close(1.0)
    assert [span.span_id for span in read_spans(tmp_path)] == [9]


def test_the_spool_is_first_in_first_out_and_survives_its_process(tmp_path):
    first = Spool(tmp_path)
    assert first.put(b"one", 1)
    assert first.put(b"two", 2)
    second = Spool(tmp_path)
    assert (len(second), second.num_spans) == (2, 3)
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


def make_requests(count):
    form = ProtobufForm()
    batches = [make_batch(form, 50, first_span_id=1 + 50 * index) for index in range(count)]
    return [form.request(batch.resource, batch.entries) for batch in batches]


def take_all(spool):
    taken = []
    while (entry := spool.oldest(0)) is not None:
        taken.append(entry.read())
        spool.remove(entry)
    return taken


@pytest.mark.parametrize("num_compressed", [0, 1, 3, 4])
def test_requests_are_the_same_and_in_order_however_many_are_compressed(tmp_path, num_compressed):
    spool = Spool(tmp_path)
    requests = make_requests(5)
    for request in requests[:4]:
        assert spool.put(request, 50)
    for _ in range(num_compressed):
        assert spool.compress_one()
    assert spool.put(requests[4], 50)
    assert spool.compress_one()
    assert (len(spool), spool.num_spans) == (5, 250)
    assert spool.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert take_all(Spool(tmp_path)) == requests
    assert list(tmp_path.iterdir()) == []


def test_a_spool_is_emptied_in_order_while_it_is_compressed(tmp_path):
    spool = Spool(tmp_path)
    requests = make_requests(4)
    for request in requests:
        spool.put(request, 50)
    assert spool.compress_one()
    assert spool.compress_one()
    assert take_all(spool) == requests
    assert not spool.compress_one()
    assert (len(spool), spool.num_bytes) == (0, 0)


def test_compressing_makes_room(tmp_path):
    (request,) = make_requests(1)
    spool = Spool(tmp_path, num_bytes_max=2 * len(request))
    assert spool.put(request, 50)
    assert spool.put(request, 50)
    assert not spool.put(request, 50)
    assert spool.compress_one()
    assert spool.compress_one()
    assert spool.put(request, 50)
    assert spool.num_bytes < 2 * len(request)


def test_a_request_compressed_by_a_killed_exporter_is_not_sent_twice(tmp_path):
    first = Spool(tmp_path)
    first.put(b"request", 1)
    (path,) = tmp_path.iterdir()
    assert first.compress_one()
    path.write_bytes(b"request")  # As if the kill had come before the old file was removed.
    assert take_all(Spool(tmp_path)) == [b"request"]
    assert list(tmp_path.iterdir()) == []


def test_a_compressed_request_that_was_cut_off_is_counted_as_dropped(tmp_path):
    first = Spool(tmp_path)
    for number in range(3):
        assert first.put(b"request %d" % number, 1)
        assert first.compress_one()
    last = max(tmp_path.iterdir())
    last.write_bytes(last.read_bytes()[:-3])
    collector = FakeCollector()
    sender = Sender(Spool(tmp_path), collector)
    sender.close(TIMEOUT_S)
    assert collector.taken == [b"request 0", b"request 1"]
    assert sender.num_spans_dropped == 1
    assert list(tmp_path.iterdir()) == []


def test_what_waits_for_an_absent_collector_is_compressed(tmp_path):
    collector = FakeCollector(is_up=False)
    spool = Spool(tmp_path)
    requests = make_requests(3)
    for request in requests:
        spool.put(request, 50)
    sender = Sender(spool, collector)
    # Compressing is what the pauses between the attempts are used for.
    collector.wait_for_attempts(4)
    assert {path.suffix for path in tmp_path.iterdir()} == {".otlpz"}
    collector.is_up = True
    sender.close(TIMEOUT_S)
    Sender(Spool(tmp_path), collector).close(TIMEOUT_S)
    assert collector.taken == requests


def test_a_draft_left_by_a_kill_is_not_taken_for_a_request(tmp_path):
    (tmp_path / "1-1-1-1.new").write_bytes(b"half")
    assert len(Spool(tmp_path)) == 0


def test_a_collector_that_comes_back_gets_everything_once_and_in_order(tmp_path):
    collector = FakeCollector(is_up=False)
    destination = OtlpDestination(tmp_path, client=collector)
    for span_id in (1, 2, 3):
        deliver(destination, 1, first_span_id=span_id)
    collector.wait_for_attempts(2)
    assert collector.taken == []
    collector.is_up = True
    collector.wait_for_attempts(5)
    destination.close(TIMEOUT_S)
    assert span_ids_in(collector.taken) == [1, 2, 3]
    assert destination.num_spans_dropped == 0
    assert collector.is_closed
    assert list(tmp_path.iterdir()) == []


def test_closing_while_the_collector_is_away_keeps_the_spool_for_the_next_start(tmp_path):
    away = FakeCollector(is_up=False)
    destination = OtlpDestination(tmp_path, client=away)
    deliver(destination, 2)
    destination.close(TIMEOUT_S)
    back = FakeCollector()
    OtlpDestination(tmp_path, client=back).close(TIMEOUT_S)
    assert span_ids_in(back.taken) == [1, 2]


def test_spans_that_do_not_fit_into_the_spool_are_counted(tmp_path):
    away = FakeCollector(is_up=False)
    destination = OtlpDestination(tmp_path, client=away, spool_bytes_max=400)
    for _ in range(4):
        deliver(destination, 1)
    assert destination.num_spans_dropped == 4 - destination._spool.num_spans > 0
    assert not destination.has_room()
    destination.close(TIMEOUT_S)


def test_a_request_that_a_present_collector_never_takes_is_dropped_and_the_next_sent(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("pageframe.telemetry.sender._BACKOFF_S_MAX", 0.001)
    monkeypatch.setattr("pageframe.telemetry.sender._BACKOFF_S_MIN", 0.001)
    collector = FakeCollector(refused={b"poison"})
    spool = Spool(tmp_path)
    spool.put(b"poison", 5)
    spool.put(b"malformed", 2)
    spool.put(b"good", 1)
    sender = Sender(spool, collector)
    collector.wait_for_attempts(10)
    sender.close(TIMEOUT_S)
    assert collector.taken == [b"good"]
    assert sender.num_spans_dropped == 7
    assert len(spool) == 0


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, JsonLinesDestination),
        ({"OTEL_SDK_DISABLED": "true"}, NowhereDestination),
        ({"OTEL_TRACES_EXPORTER": "none"}, NowhereDestination),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, OtlpDestination),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, OtlpDestination),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            },
            JsonLinesDestination,
        ),
    ],
)
def test_the_standard_variables_choose_the_destination(tmp_path, environment, kind):
    destination = choose_destination(tmp_path, "pageframe", environment=environment)
    assert isinstance(destination, kind)
    destination.close(TIMEOUT_S)
