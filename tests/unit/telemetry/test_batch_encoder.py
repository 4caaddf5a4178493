"""Batches become requests: complete, bounded, and counted when something is wrong."""

import pytest

from pageframe.core.trace import KvCause, KvOperation, TraceMode
from pageframe.telemetry.batch_encoder import BatchEncoder, split_into_requests
from pageframe.telemetry.json_form import JsonForm
from pageframe.telemetry.mapping import SpanMapper
from pageframe.telemetry.protobuf_form import ProtobufForm
from pageframe.telemetry.record_batch import Loss, Producer, RecordBatch
from pageframe.telemetry.ring import RECORD_HEADER, RecordKind, RingReader
from pageframe.telemetry.sink import RingTraceSink
from pageframe.telemetry.span_records import pack_span
from unit.telemetry.records_of import EXECUTOR, make_batch, read_packed
from unit.telemetry.spans_of_request import names_in, spans_in


def make_span(name="step", **attributes):
    return pack_span(
        name,
        trace_id=bytes(range(16)),
        span_id=3,
        parent_span_id=2,
        start_ns=1,
        end_ns=2,
        attributes=attributes,
        links=[(bytes(range(16)), 1)],
        error="",
    )


def make_operations(path, num_operations, num_ids=1):
    sink = RingTraceSink.create(path, "s", TraceMode.ALL)
    for _ in range(num_operations):
        sink.kv(
            KvOperation.ALLOCATE,
            KvCause.DECODE,
            sequence_id=0,
            generation=0,
            position=0,
            step=1,
            block_ids=range(num_ids),
            num_free_after=9,
        )
    return read_packed(RingReader(path))


def all_names(requests):
    return [name for request, _ in requests for name in names_in(request)]


def test_operations_and_finished_spans_become_one_request(tmp_path):
    batch = make_batch(*make_operations(tmp_path / "ring", 2), make_span("step"))
    ((request, num_spans),) = BatchEncoder(JsonForm()).requests(batch)
    spans = spans_in(request)
    assert sorted(span.name for span in spans) == ["kv.allocate", "kv.allocate", "pool", "step"]
    assert num_spans == 4
    assert {span.service for span in spans} == {"pageframe-executor"}


def test_a_batch_is_the_same_after_it_was_packed(tmp_path):
    batch = make_batch(
        *make_operations(tmp_path / "ring", 2),
        make_span("a\nb"),
        producer=Producer('a "name"', 2**63 - 1, 7),
        losses=[Loss("ring", 3, 10), Loss("exporter", 1, 1)],
    )
    assert RecordBatch.unpack(batch.pack()) == batch


@pytest.mark.parametrize(
    "packed", [b"", b"\n", b"no json\n", b"[]\n", b'{"producer": 1}\n', b'{"a": 1}\nabc']
)
def test_a_batch_with_a_damaged_header_is_refused(packed):
    with pytest.raises(ValueError, match=r"."):
        RecordBatch.unpack(packed)


def test_large_batches_are_split_so_that_each_request_stays_under_the_bound(tmp_path):
    batch = make_batch(*make_operations(tmp_path / "ring", 40, num_ids=100))
    requests = BatchEncoder(JsonForm(), 20_000).requests(batch)
    assert all(len(request) < 20_000 for request, _ in requests)
    assert [number for _, number in requests] == [len(names_in(r)) for r, _ in requests]
    operations = [
        span.attributes["kv.operation"]
        for request, _ in requests
        for span in spans_in(request)
        if span.name == "kv.allocate"
    ]
    assert operations == list(range(1, 41))


def test_a_single_span_keeps_its_complete_list_whatever_the_bound(tmp_path):
    batch = make_batch(*make_operations(tmp_path / "ring", 1, num_ids=5_000))
    spans = [
        span
        for request, _ in BatchEncoder(JsonForm(), 1_000).requests(batch)
        for span in spans_in(request)
    ]
    (ids,) = [span.attributes["kv.block_ids"] for span in spans if span.name == "kv.allocate"]
    assert ids == tuple(range(5_000))


def test_nothing_makes_no_request():
    mapper = SpanMapper(EXECUTOR)
    assert list(split_into_requests(ProtobufForm(), mapper.resource, [], 1000)) == []
    assert BatchEncoder(ProtobufForm()).requests(make_batch()) == []


def test_losses_are_told_by_spans_of_their_own():
    batch = make_batch(losses=[Loss("ring", 3, 10), Loss("exporter", 1, 1)])
    ((request, _),) = BatchEncoder(JsonForm()).requests(batch)
    drops = [span for span in spans_in(request) if span.name == "trace.drop"]
    assert [
        (
            span.attributes["pageframe.trace.dropped_by"],
            span.attributes["pageframe.trace.num_dropped"],
            span.attributes["pageframe.trace.num_dropped_total"],
        )
        for span in drops
    ] == [("ring", 3, 10), ("exporter", 1, 1)]


def test_producers_keep_their_own_names_and_traces(tmp_path):
    records = make_operations(tmp_path / "ring", 1)
    encoder = BatchEncoder(JsonForm())
    found = []
    for service, incarnation in (("pageframe-executor", 1), ("pageframe-gateway", 2)) * 2:
        batch = make_batch(*records, producer=Producer(service, incarnation, 5))
        ((request, _),) = encoder.requests(batch)
        found.append([(span.service, span.name) for span in spans_in(request)])
    executor, gateway = "pageframe-executor", "pageframe-gateway"
    assert [sorted(spans) for spans in found] == [
        [(executor, "kv.allocate"), (executor, "pool")],
        [(gateway, "kv.allocate"), (gateway, "process")],
        [(executor, "kv.allocate")],
        [(gateway, "kv.allocate")],
    ]


def test_a_record_that_is_not_understood_is_counted_and_passed_over():
    encoder = BatchEncoder(JsonForm())
    unknown = RECORD_HEADER.pack(16, 99) + bytes(8)
    assert all_names(encoder.requests(make_batch(unknown, make_span("good")))) == ["good"]
    assert encoder.num_spans_failed == 1


def test_padding_between_records_is_no_record():
    encoder = BatchEncoder(JsonForm())
    padding = RECORD_HEADER.pack(24, RecordKind.PAD) + bytes(16)
    batch = make_batch(make_span("one"), padding, make_span("two"))
    assert all_names(encoder.requests(batch)) == ["one", "two"]
    assert encoder.num_spans_failed == 0


def test_a_span_that_cannot_be_encoded_is_counted_and_its_neighbours_are_not():
    encoder = BatchEncoder(JsonForm())
    batch = make_batch(
        make_span("before"), make_span("broken", answer={"no": "attribute"}), make_span("after")
    )
    assert all_names(encoder.requests(batch)) == ["before", "after"]
    assert encoder.num_spans_failed == 1


class NoClasses(JsonForm):
    """Without the official encoder."""

    def spans(self, spans):
        raise RuntimeError("nobody knows why")


def test_spans_of_the_exporter_itself_that_cannot_be_encoded_are_counted_and_others_are_sent(
    tmp_path,
):
    encoder = BatchEncoder(NoClasses())
    batch = make_batch(*make_operations(tmp_path / "ring", 1), losses=[Loss("ring", 3, 10)])
    assert all_names(encoder.requests(batch)) == ["kv.allocate"]
    assert encoder.num_spans_failed == len(["pool", "trace.drop"])


@pytest.mark.parametrize("num_bytes_lost", [1, 100])
@pytest.mark.parametrize("length", [None, 0, 7])
def test_the_rest_of_a_damaged_batch_is_counted(num_bytes_lost, length):
    encoder = BatchEncoder(JsonForm())
    whole = make_batch(make_span("one"), make_span("two"), make_span("three"))
    records = bytearray(whole.records)
    if length is None:
        del records[-num_bytes_lost:]
    else:
        start = list(whole.each_record())[2][0]
        RECORD_HEADER.pack_into(records, start, length, RecordKind.SPAN)
    damaged = RecordBatch(whole.producer, 1, 3, (), bytes(records))
    assert all_names(encoder.requests(damaged)) == ["one", "two"]
    assert encoder.num_spans_failed == 1
