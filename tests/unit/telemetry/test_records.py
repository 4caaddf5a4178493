"""Records: what is packed comes back, and nothing else is understood."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageframe.core.trace import KvCause, KvOperation, TraceMode
from pageframe.telemetry.records import KvRecord, unpack
from pageframe.telemetry.ring import RECORD_HEADER, RingReader
from pageframe.telemetry.sink import RingTraceSink
from pageframe.telemetry.span_records import SpanRecord, pack_span
from unit.telemetry.records_of import read_all

ids = st.lists(st.integers(0, 2**32 - 1), max_size=40)
names = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)


@given(
    operation=st.sampled_from(KvOperation),
    cause=st.sampled_from(KvCause),
    sequence_id=st.integers(1, 2**64 - 1),
    generation=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**64 - 1),
    block_ids=ids,
    target_ids=ids,
    num_free_after=st.integers(0, 2**32 - 1),
    tenant=names,
    trace_id=st.binary(min_size=16, max_size=16),
    span_id=st.binary(min_size=8, max_size=8),
)
def test_a_kv_record_comes_back_whole(
    tmp_path_factory, trace_id, span_id, tenant, sequence_id, block_ids, target_ids, **fields
):
    path = tmp_path_factory.mktemp("ring") / "ring"
    sink = RingTraceSink.create(path, "s", TraceMode.ALL, capacity_bytes=8192)
    sink.sequence_begin(
        sequence_id, trace_id=trace_id, span_id=span_id, request_id="", tenant=tenant
    )
    sink.kv(**fields, sequence_id=sequence_id, block_ids=block_ids, target_ids=target_ids)
    reader = RingReader(path)
    (record,) = read_all(reader)
    reader.close()
    sink.close()
    assert isinstance(record, KvRecord)
    assert record == KvRecord(
        time_ns=record.time_ns,
        number=1,
        sequence_id=sequence_id,
        trace_id=trace_id,
        span_id=int.from_bytes(span_id, "big"),
        tenant=tenant,
        block_ids=tuple(block_ids),
        target_ids=tuple(target_ids),
        **fields,
    )


@given(
    name=names,
    attributes=st.dictionaries(
        names,
        names
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False)
        | st.lists(st.integers(0, 99)),
    ),
    links=st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.integers(1, 2**64 - 1))),
    error=names,
)
def test_a_span_record_comes_back_whole(name, attributes, links, error):
    fixed = {
        "trace_id": bytes(range(16)),
        "span_id": 2**64 - 1,
        "parent_span_id": 5,
        "start_ns": 10,
        "end_ns": 2**63,
    }
    packed = pack_span(name, attributes=attributes, links=links, error=error, **fixed)
    assert len(packed) % 8 == 0
    assert RECORD_HEADER.unpack_from(packed)[0] == len(packed)
    assert unpack(packed) == SpanRecord(
        name=name, attributes=attributes, links=tuple(links), error=error, **fixed
    )


def test_ranges_and_tuples_are_taken_as_block_ids_and_attributes():
    packed = pack_span(
        "decode",
        trace_id=bytes(16),
        span_id=1,
        parent_span_id=0,
        start_ns=0,
        end_ns=0,
        attributes={"a": range(3), "b": ("x", "y")},
        links=(),
        error="",
    )
    assert unpack(packed).attributes == {"a": [0, 1, 2], "b": ["x", "y"]}


@pytest.mark.parametrize(
    "record",
    [
        RECORD_HEADER.pack(16, 99) + bytes(8),
        RECORD_HEADER.pack(8, 1),
        RECORD_HEADER.pack(8, 2),
        RECORD_HEADER.pack(8, 3),
        RECORD_HEADER.pack(96, 1) + bytes(88),
    ],
)
def test_a_record_of_unknown_or_short_content_is_refused(record):
    with pytest.raises((ValueError, struct.error)):
        unpack(record)
