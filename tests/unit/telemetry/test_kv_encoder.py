"""KV records straight to bytes: the same spans as through OpenTelemetry's own classes."""

import json
import random
import struct

import pytest
from opentelemetry.exporter.otlp.json.common.trace_encoder import encode_spans as encode_json
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans as encode_protobuf
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from pageframe.core.trace import KvCause, KvOperation
from pageframe.telemetry.json_form import JsonForm
from pageframe.telemetry.kv_encoder import KvEncoder
from pageframe.telemetry.mapping import SpanMapper
from pageframe.telemetry.protobuf_form import ProtobufForm
from pageframe.telemetry.record_batch import Loss, Producer
from pageframe.telemetry.records import kv_layout, pack_context, unpack

INCARNATION = 1_763_700_000_000_000_000
TENANTS = ("", "acme", 'quo"te\\', "größe", "x" * 256, "\N{SNOWMAN}" * 30, "a\udc00b")


def make_mapper():
    return SpanMapper(Producer("pageframe-executor", INCARNATION, 17))


def pack(
    *,
    time_ns=1_000,
    number=1,
    operation=KvOperation.ALLOCATE,
    cause=KvCause.DECODE,
    sequence_id=7,
    generation=0,
    position=0,
    step=1,
    num_free_after=9,
    trace_id=bytes(range(16)),
    span_id=bytes(range(8)),
    tenant="acme",
    block_ids=(1,),
    target_ids=(),
    part=0,
):
    context = pack_context(trace_id, span_id, tenant)
    layout = kv_layout(len(context), len(block_ids), len(target_ids), part)
    record = bytearray(layout.num_bytes)
    # fmt: off
    layout.pack_into(
        record, 0, layout.header, time_ns, number, sequence_id, step, generation, position,
        num_free_after, operation, cause, layout.sizes, context, *block_ids, *target_ids,
    )
    # fmt: on
    return bytes(record)


def random_number(rng, num_bits):
    """Of every length, so that varints of all lengths occur."""
    return rng.getrandbits(rng.randint(0, num_bits))


def random_record(rng, number):
    num_blocks = rng.choice((0, 1, 1, 1, 2, 3, 4, 40))
    is_copy = rng.random() < 0.2
    is_traced = rng.random() < 0.7
    return pack(
        time_ns=1 + random_number(rng, 63),
        number=number,
        operation=rng.choice(list(KvOperation)),
        cause=rng.choice(list(KvCause)),
        sequence_id=rng.choice((0, 1, 2, 3, random_number(rng, 64))),
        generation=random_number(rng, 32),
        position=random_number(rng, 32),
        step=random_number(rng, 64),
        num_free_after=random_number(rng, 32),
        trace_id=rng.randbytes(16) if is_traced else bytes(16),
        span_id=rng.choice((rng.randbytes(8), bytes(range(8)))) if is_traced else bytes(8),
        tenant=rng.choice(TENANTS),
        block_ids=[random_number(rng, 32) for _ in range(num_blocks)],
        target_ids=[random_number(rng, 32) for _ in range(num_blocks)] if is_copy else (),
        part=random_number(rng, 16) if is_traced and rng.random() < 0.3 else 0,
    )


def random_numbers(rng, count):
    """Operation numbers that go up, by one mostly, and reach the largest there is."""
    number = 0
    for index in range(count):
        number += 1 if index % 50 else 1 + random_number(rng, 58)
        yield number


def encode_directly(form, records):
    """A request of all records, roots of home traces among them, in the order of the mapper."""
    mapper = make_mapper()
    encoder = KvEncoder(form, mapper)
    entries = []
    packed, at = b"".join(records), 0
    for record in records:
        made = []
        entry = encoder.encode(packed, at, made)
        entries += [*form.spans(made), entry]
        at += len(record)
    return form.request(mapper.resource, entries)


def map_slowly(records):
    mapper = make_mapper()
    return [span for record in records for span in mapper.spans(unpack(record))]


@pytest.fixture(params=range(4))
def records(request):
    print("seed", request.param)
    rng = random.Random(request.param)
    return [random_record(rng, number) for number in random_numbers(rng, 1500)]


def test_thousands_of_random_operations_are_the_same_spans_in_protobuf(records):
    written = encode_directly(ProtobufForm(), records)
    expected = encode_protobuf(map_slowly(records))
    found = ExportTraceServiceRequest.FromString(written)
    spans = found.resource_spans[0].scope_spans[0].spans
    expected_spans = expected.resource_spans[0].scope_spans[0].spans
    assert len(spans) == len(expected_spans) > len(records)
    for span, expected_span in zip(spans, expected_spans, strict=True):
        assert span == expected_span
    assert found == expected


def test_thousands_of_random_operations_are_the_same_characters_in_json(records):
    written = encode_directly(JsonForm(), records)
    expected = encode_json(map_slowly(records)).to_dict()
    assert written == json.dumps(expected, separators=(",", ":")).encode() + b"\n"


def test_a_memory_that_overflows_gives_the_same_bytes(records, monkeypatch):
    expected = encode_directly(ProtobufForm(), records)
    for name in ("CONTEXTS", "SEQUENCES", "PARENTS", "STEPS", "NUMBERS", "SHAPES"):
        monkeypatch.setattr(f"pageframe.telemetry.kv_encoder._NUM_{name}_REMEMBERED_MAX", 2)
    monkeypatch.setattr("pageframe.telemetry.protobuf_form._NUM_IDS_REMEMBERED_MAX", 2)
    assert encode_directly(ProtobufForm(), records) == expected


@pytest.mark.parametrize("cause", KvCause)
@pytest.mark.parametrize("position", [0, 127, 128, 300])
def test_every_cause_hangs_where_the_mapper_hangs_it(cause, position):
    records = [pack(cause=cause, position=position, generation=3)]
    assert ExportTraceServiceRequest.FromString(
        encode_directly(ProtobufForm(), records)
    ) == encode_protobuf(map_slowly(records))


def test_the_pools_own_trace_is_cut_where_the_mapper_cuts_it():
    records = [
        pack(number=number, trace_id=bytes(16), span_id=bytes(8)) for number in range(8_995, 9_005)
    ]
    found = ExportTraceServiceRequest.FromString(encode_directly(ProtobufForm(), records))
    assert found == encode_protobuf(map_slowly(records))
    spans = found.resource_spans[0].scope_spans[0].spans
    assert [span.name for span in spans].count("pool") == 2
    assert len({span.trace_id for span in spans}) == 2


def test_an_operation_on_thousands_of_blocks_names_every_one():
    records = [pack(block_ids=range(65_536)), pack(number=2, block_ids=())]
    form = ProtobufForm()
    found = ExportTraceServiceRequest.FromString(encode_directly(form, records))
    assert found == encode_protobuf(map_slowly(records))


@pytest.mark.parametrize(
    ("at", "value"), [(52, 0), (52, 99), (53, 0), (53, 99)], ids=lambda value: str(value)
)
def test_an_unknown_operation_or_cause_is_refused_and_makes_no_root(at, value):
    record = bytearray(pack(trace_id=bytes(16), span_id=bytes(8)))
    record[at] = value
    made = []
    with pytest.raises(ValueError, match=str(value)):
        KvEncoder(ProtobufForm(), make_mapper()).encode(bytes(record), 0, made)
    assert made == []


@pytest.mark.parametrize("num_bytes", [8, 63, 95])
def test_a_record_that_is_cut_off_is_refused(num_bytes):
    with pytest.raises(struct.error):
        KvEncoder(ProtobufForm(), make_mapper()).encode(pack()[:num_bytes], 0, [])


def test_finished_spans_and_operations_share_a_request():
    mapper = make_mapper()
    form = ProtobufForm()
    made = mapper.loss_spans(Loss("ring", 1, 1), time_ns=5)
    entries = [*form.spans(made), KvEncoder(form, mapper).encode(pack(), 0, [])]
    found = ExportTraceServiceRequest.FromString(form.request(mapper.resource, entries))
    expected = encode_protobuf([*made, *make_mapper().spans(unpack(pack()))])
    assert found == expected
