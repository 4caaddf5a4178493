"""Span records straight to bytes: the same spans as through OpenTelemetry's own classes."""

import json
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.json.common.trace_encoder import encode_spans as encode_json
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans as encode_protobuf

from pageframe.core.trace import NumberColumns, NumberRow
from pageframe.telemetry.json_form import JsonForm
from pageframe.telemetry.mapping import SpanMapper
from pageframe.telemetry.protobuf_form import ProtobufForm
from pageframe.telemetry.record_batch import Producer
from pageframe.telemetry.span_encoder import SpanEncoder
from pageframe.telemetry.span_records import SPAN_FIXED, pack_span, unpack_span

PRODUCER = Producer("pageframe-scheduler", 1_763_700_000_000_000_000, 17)
TRACE_ID = bytes(range(16))
FINISHED = {
    "trace_id": TRACE_ID,
    "span_id": 7,
    "parent_span_id": 6,
    "start_ns": 1_763_700_000_000_000_000,
    "end_ns": 1_763_700_000_000_000_005,
    "attributes": {},
    "links": (),
    "error": "",
}

texts = st.text(max_size=80) | st.sampled_from(["", "acme", "a\ud800b", 'quo"te\\', "x" * 20_000])
numbers = st.integers(-(2**70), 2**70) | st.sampled_from([0, 127, 128, 16_383, 16_384, 2**28])
values = st.one_of(
    texts,
    st.booleans(),
    numbers,
    st.floats(),
    st.lists(numbers, max_size=4),
    st.lists(texts, max_size=4),
    st.lists(st.one_of(st.booleans(), st.floats(), texts, st.lists(numbers, max_size=2))),
)
ids = st.integers(1, 2**64 - 1)
spans = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["generate", "decode", "", "a\ud800", "größe", "5 %d %s"]),
        "trace_id": st.binary(min_size=16, max_size=16),
        "span_id": ids,
        "parent_span_id": st.just(0) | ids,
        "start_ns": st.just(0) | ids,
        "end_ns": st.just(0) | ids,
        "attributes": st.dictionaries(st.sampled_from(["a", "b", "c%d", "größe", ""]), values),
        "links": st.lists(st.tuples(st.binary(min_size=16, max_size=16), ids), max_size=3),
        "error": texts,
    }
)


def pack(name, **fields):
    return pack_span(name, **(FINISHED | fields))


def encode_directly(form, records):
    encoder = SpanEncoder(form)
    packed, at, entries = b"".join(records), 0, []
    for record in records:
        entries.append(encoder.encode(packed, at))
        at += len(record)
    return form.request(SpanMapper(PRODUCER).resource, entries)


def map_slowly(records):
    mapper = SpanMapper(PRODUCER)
    return [span for record in records for span in mapper.spans(unpack_span(record))]


def check(records):
    expected = map_slowly(records)
    assert encode_directly(ProtobufForm(), records) == encode_protobuf(expected).SerializeToString()
    line = json.dumps(encode_json(expected).to_dict(), separators=(",", ":")).encode() + b"\n"
    assert encode_directly(JsonForm(), records) == line


@settings(deadline=None, max_examples=60)
@given(st.lists(spans, min_size=1, max_size=5))
def test_any_spans_are_the_same_bytes_in_protobuf_and_the_same_characters_in_json(fields):
    check([pack_span(**item) for item in fields])


@pytest.mark.parametrize("number_of_bits", range(0, 64, 7))
def test_integers_of_every_length_are_written_alike(number_of_bits):
    edge = 1 << number_of_bits
    check(
        [
            pack("step", attributes={"n": sign * (edge + near)})
            for sign in (1, -1)
            for near in (-1, 0)
        ]
    )


def test_a_shape_that_was_seen_before_does_not_bring_its_old_values_along():
    rng = random.Random(5)
    records = [
        pack(
            rng.choice(["prefill", "decode"]),
            attributes={
                "tenant": rng.choice("ab"),
                "n": rng.randrange(9),
                "is": rng.random() < 0.5,
            },
            error=rng.choice(["", "late"]),
            links=[(TRACE_ID, 1 + rng.randrange(9))] * rng.randrange(3),
        )
        for _ in range(300)
    ]
    check(records)


def test_more_texts_than_are_remembered_are_written_alike(monkeypatch):
    monkeypatch.setattr("pageframe.telemetry.span_form._NUM_TEXTS_REMEMBERED_MAX", 2)
    check([pack("sequence", attributes={"id": str(index % 5)}) for index in range(30)])


def test_a_row_of_numbers_is_the_same_record_as_a_dictionary():
    columns = NumberColumns({"n": int, "m": int, "x": float})
    for numbers in ((1, -5, 0.5), (2**63 - 1, 0, 1e300), (1, 2, 0.0)):
        row, plain = NumberRow(columns, *numbers), dict(zip("nmx", numbers, strict=True))
        assert row == plain
        assert (row["m"], len(row), [*row]) == (numbers[1], 3, ["n", "m", "x"])
        assert pack("step", attributes=row) == pack("step", attributes=plain)
        assert pack("other", attributes=row) == pack("other", attributes=plain)


def test_numbers_of_a_row_that_its_columns_cannot_hold_are_kept():
    row = NumberRow(NumberColumns({"n": int, "m": int}), 2**64, 7)
    assert unpack_span(pack("step", attributes=row)).attributes == {"n": str(2**64), "m": 7}
    with pytest.raises(KeyError):
        row["other"]


def test_the_generate_span_answers_a_call_and_others_are_internal():
    check([pack(name, attributes={"a": 1}) for name in ("generate", "sequence", "generate")])


def test_numbers_that_json_does_not_have_are_written_alike():
    numbers = [float("nan"), float("inf"), -float("inf"), 1e22, 5e-324]
    check([pack("step", attributes={"x": number}) for number in numbers])
    check([pack("step", attributes={"x": numbers})])


def test_one_with_true_and_one_with_one_are_not_taken_for_each_other():
    check([pack("step", attributes={"a": value}) for value in (1, True, 1.0, "1", 0, False, 0.0)])


@pytest.mark.parametrize(
    ("offset", "number"),
    [(56, 10_000), (56, 3), (60, 10_000), (64, 500)],
    ids=["long shape", "short shape", "long error", "many links"],
)
def test_a_record_that_says_it_is_longer_than_it_is_is_refused(offset, number):
    record = bytearray(pack("decode", attributes={"a": 1, "b": "text"}))
    struct.pack_into("<I", record, offset, number)
    for refuses in (unpack_span, lambda damaged: SpanEncoder(JsonForm()).encode(damaged, 0)):
        with pytest.raises((ValueError, struct.error)):
            refuses(bytes(record))


@pytest.mark.parametrize(
    "shape", [b"[]", b"3", b'["a","q",3]', b'["a","x",["k"]]', b'["a","q",[]]']
)
def test_a_shape_that_is_none_is_refused(shape):
    fixed = SPAN_FIXED.pack(96, 3, TRACE_ID, 1, 0, 1, 1, len(shape), 0, 0)
    record = (fixed + shape).ljust(96, b"\0")
    for form in (JsonForm(), ProtobufForm()):
        with pytest.raises(ValueError, match=r"."):
            SpanEncoder(form).encode(record, 0)


@pytest.mark.parametrize("answer", [None, {"a": 1}, [None]])
def test_a_value_that_no_attribute_may_have_is_refused(answer):
    for form in (JsonForm(), ProtobufForm()):
        with pytest.raises(TypeError, match="attribute"):
            SpanEncoder(form).encode(pack("step", attributes={"a": answer}), 0)
