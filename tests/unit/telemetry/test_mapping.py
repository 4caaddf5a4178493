"""From records to spans: exact ids, parents and attributes."""

import pytest
from opentelemetry.trace import SpanKind as OtelSpanKind
from opentelemetry.trace import StatusCode

from pageframe.core.trace import KvCause, KvOperation, SpanKind, child_span_id
from pageframe.telemetry.mapping import SpanMapper, home_root_span_id, home_trace_id, kv_span_id
from pageframe.telemetry.record_batch import Loss, Producer
from pageframe.telemetry.records import KvRecord
from pageframe.telemetry.span_records import SpanRecord
from pageframe.telemetry.trace_parts import PartKind, part_root

TRACE_ID = bytes(range(16))
SEQUENCE_SPAN = 0xABCDEF
INCARNATION = 99


def make_mapper(service_name="pageframe-executor"):
    return SpanMapper(Producer(service_name, INCARNATION, 1))


def make_kv(**fields):
    defaults = {
        "time_ns": 1_000,
        "number": 5,
        "operation": KvOperation.ALLOCATE,
        "cause": KvCause.PREFILL,
        "sequence_id": 7,
        "generation": 2,
        "position": 64,
        "step": 11,
        "num_free_after": 3,
        "trace_id": TRACE_ID,
        "span_id": SEQUENCE_SPAN,
        "tenant": "acme",
        "block_ids": (4, 5),
        "target_ids": (),
    }
    return KvRecord(**(defaults | fields))


@pytest.mark.parametrize(
    ("cause", "position", "parent"),
    [
        (KvCause.PREFILL, 64, child_span_id(SEQUENCE_SPAN, SpanKind.PREFILL, 2, 64)),
        (KvCause.DECODE, 127, child_span_id(SEQUENCE_SPAN, SpanKind.DECODE, 2, 0)),
        (KvCause.DECODE, 128, child_span_id(SEQUENCE_SPAN, SpanKind.DECODE, 2, 1)),
        (KvCause.PREFIX_HIT, 64, child_span_id(SEQUENCE_SPAN, SpanKind.PREFILL, 2, 64)),
        (KvCause.FINISHED, 128, SEQUENCE_SPAN),
        (KvCause.PREEMPTED, 128, SEQUENCE_SPAN),
        (KvCause.CANCELLED, 128, SEQUENCE_SPAN),
    ],
)
def test_the_cause_says_under_which_span_an_operation_hangs(cause, position, parent):
    (span,) = make_mapper().spans(make_kv(cause=cause, position=position))
    assert span.context.trace_id == int.from_bytes(TRACE_ID, "big")
    assert span.context.span_id == kv_span_id(INCARNATION, 5)
    assert span.parent.span_id == parent
    assert span.parent.trace_id == span.context.trace_id


def test_an_operation_names_its_blocks_and_everything_about_it():
    (span,) = make_mapper().spans(make_kv())
    assert span.name == "kv.allocate"
    assert (span.start_time, span.end_time) == (1_000, 1_000)
    assert span.kind is OtelSpanKind.INTERNAL
    assert dict(span.attributes) == {
        "kv.block_ids": (4, 5),
        "kv.operation": 5,
        "kv.pool_incarnation": INCARNATION,
        "kv.step": 11,
        "kv.cause": "prefill",
        "kv.sequence": 7,
        "kv.generation": 2,
        "kv.position": 64,
        "kv.tenant": "acme",
        "kv.blocks.free_after": 3,
    }


def test_a_copy_names_sources_and_targets():
    record = make_kv(operation=KvOperation.COPY_ON_WRITE, block_ids=(1, 2), target_ids=(8, 9))
    (span,) = make_mapper().spans(record)
    assert span.name == "kv.copy_on_write"
    assert span.attributes["kv.block_ids.source"] == (1, 2)
    assert span.attributes["kv.block_ids.target"] == (8, 9)
    assert "kv.block_ids" not in span.attributes


def test_an_operation_of_a_later_part_hangs_under_its_root_and_links_to_the_parent_that_it_left():
    (span,) = make_mapper().spans(make_kv(part=3))
    trace_id, root = part_root(TRACE_ID, INCARNATION, PartKind.OPERATIONS, 3)
    assert span.context.trace_id == int.from_bytes(trace_id, "big")
    assert (span.parent.trace_id, span.parent.span_id) == (span.context.trace_id, root)
    (link,) = span.links
    assert link.context.trace_id == int.from_bytes(TRACE_ID, "big")
    assert link.context.span_id == child_span_id(SEQUENCE_SPAN, SpanKind.PREFILL, 2, 64)


def test_the_service_is_named_and_cannot_be_renamed_from_outside(monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "other")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    (span,) = make_mapper("pageframe-executor").spans(make_kv())
    assert span.resource.attributes["service.name"] == "pageframe-executor"
    assert span.resource.attributes["deployment.environment"] == "test"


@pytest.mark.parametrize(
    "untraced",
    [
        {"sequence_id": 0, "trace_id": bytes(16), "span_id": 0},
        {"trace_id": bytes(16), "span_id": 0},
    ],
)
def test_what_serves_no_traced_request_goes_to_the_trace_of_the_pool(untraced):
    root, span = make_mapper().spans(make_kv(**untraced))
    trace_id = home_trace_id(INCARNATION, 0)
    assert (root.name, root.parent) == ("pool", None)
    assert root.context.span_id == home_root_span_id(INCARNATION, 0)
    assert root.context.trace_id == int.from_bytes(trace_id, "big") == span.context.trace_id
    assert span.parent.span_id == root.context.span_id
    assert span.context.span_id == kv_span_id(INCARNATION, 5)
    assert ("kv.sequence" in span.attributes) is bool(untraced.get("sequence_id", 7))


def test_the_pools_own_trace_is_cut_every_nine_thousand_operations_and_each_part_links_back():
    mapper = make_mapper()
    spans = []
    for number in range(1, 22_001):
        spans += mapper.spans(make_kv(number=number, trace_id=bytes(16), span_id=0))
    counts: dict[int, int] = {}
    for span in spans:
        counts[span.context.trace_id] = counts.get(span.context.trace_id, 0) + 1
    assert list(counts.values()) == [9_000, 9_001, 4_002]
    first, second, third = (span for span in spans if span.name == "pool")
    assert first.links == ()
    assert second.links[0].context.span_id == first.context.span_id
    assert third.links[0].context.trace_id == second.context.trace_id
    assert len({span.context.span_id for span in spans}) == len(spans)


def test_a_new_exporter_puts_an_operation_into_the_same_trace_of_the_pool():
    operations = [make_kv(number=number, trace_id=bytes(16), span_id=0) for number in (9, 20_001)]
    mapper = make_mapper()
    first = [span for record in operations for span in mapper.spans(record)]
    second = make_mapper().spans(operations[1])
    assert [span.context.span_id for span in first[2:]] == [span.context.span_id for span in second]
    assert [span.context.trace_id for span in first[2:]] == [
        span.context.trace_id for span in second
    ]


def test_the_operations_of_an_incarnation_never_share_an_id():
    ids = {kv_span_id(INCARNATION, number) for number in range(1, 10_001)}
    assert len(ids) == 10_000
    assert all(0 < span_id < 2**64 for span_id in ids)
    assert kv_span_id(INCARNATION + 1, 1) not in ids


def test_the_same_record_becomes_the_same_span():
    ids = {make_mapper().spans(make_kv())[0].context.span_id for _ in range(3)}
    assert len(ids) == 1


def test_a_finished_span_keeps_its_ids_times_links_and_error():
    (span,) = make_mapper("pageframe-gateway").spans(
        SpanRecord(
            name="generate",
            trace_id=TRACE_ID,
            span_id=2**64 - 1,
            parent_span_id=0,
            start_ns=5,
            end_ns=9,
            attributes={"pageframe.tenant": "acme", "tokens": [1, 2]},
            links=((bytes(15) + b"\1", 3),),
            error="too late",
        )
    )
    assert span.context.span_id == 2**64 - 1
    assert span.parent is None
    assert span.kind is OtelSpanKind.SERVER
    assert (span.start_time, span.end_time) == (5, 9)
    assert dict(span.attributes) == {"pageframe.tenant": "acme", "tokens": (1, 2)}
    assert (span.links[0].context.trace_id, span.links[0].context.span_id) == (1, 3)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "too late")


def test_values_that_otlp_cannot_carry_are_made_fit():
    (span,) = make_mapper().spans(
        SpanRecord(
            name="step",
            trace_id=TRACE_ID,
            span_id=1,
            parent_span_id=0,
            start_ns=0,
            end_ns=0,
            attributes={"seed": 2**64 - 1, "text": "a\ud800b", "ids": [2**63]},
        )
    )
    assert dict(span.attributes) == {"seed": str(2**64 - 1), "text": "a?b", "ids": (str(2**63),)}


def test_drops_are_told_in_the_trace_of_the_process():
    root, span = make_mapper("pageframe-gateway").loss_spans(Loss("ring", 3, 10), time_ns=4)
    assert root.name == "process"
    assert span.name == "trace.drop"
    assert span.parent.span_id == root.context.span_id
    assert span.attributes["pageframe.trace.num_dropped"] == 3
    assert span.attributes["pageframe.trace.num_dropped_total"] == 10
    assert span.attributes["pageframe.trace.dropped_by"] == "ring"
    assert span.status.status_code is StatusCode.ERROR


def test_drops_are_told_beside_the_operation_before_them():
    mapper = make_mapper()
    _, before = mapper.spans(make_kv(number=35_000, trace_id=bytes(16), span_id=0))
    (span,) = mapper.loss_spans(Loss("ring", 1, 1), time_ns=4)
    assert span.context.trace_id == before.context.trace_id


def test_a_step_that_otlp_cannot_carry_becomes_text():
    (span,) = make_mapper().spans(make_kv(step=2**63))
    assert span.attributes["kv.step"] == str(2**63)
