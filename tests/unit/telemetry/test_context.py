"""Trace context: the W3C header, ids, the sampling rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

from pageframe.telemetry.context import (
    TraceContext,
    format_traceparent,
    is_sampled,
    new_span_id,
    new_trace_id,
    parse_traceparent,
    span_id_from_bytes,
    span_id_to_bytes,
)

TRACE_HEX = "0af7651916cd43dd8448eb211c80319c"
SPAN_HEX = "b7ad6b7169203331"


def test_the_example_of_the_specification_is_read():
    assert parse_traceparent(f"00-{TRACE_HEX}-{SPAN_HEX}-01") == TraceContext(
        bytes.fromhex(TRACE_HEX), int(SPAN_HEX, 16), True
    )


def test_only_the_last_bit_of_the_flags_means_sampled():
    for flags, sampled in (("00", False), ("01", True), ("02", False), ("ff", True)):
        context = parse_traceparent(f"00-{TRACE_HEX}-{SPAN_HEX}-{flags}")
        assert context is not None
        assert context.sampled is sampled


def test_a_later_version_may_append_fields():
    assert parse_traceparent(f"01-{TRACE_HEX}-{SPAN_HEX}-01-more") is not None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "garbage",
        f"00-{TRACE_HEX}-{SPAN_HEX}",
        f"00-{TRACE_HEX}-{SPAN_HEX}-1",
        f"00-{TRACE_HEX.upper()}-{SPAN_HEX}-01",
        f"00-{'0' * 32}-{SPAN_HEX}-01",
        f"00-{TRACE_HEX}-{'0' * 16}-01",
        f"ff-{TRACE_HEX}-{SPAN_HEX}-01",
        f"00-{TRACE_HEX}-{SPAN_HEX}-01-more",
        f"01-{TRACE_HEX}-{SPAN_HEX}-01more",
        f"00-{TRACE_HEX}-{SPAN_HEX}-0g",
    ],
)
def test_an_invalid_header_is_ignored(header):
    assert parse_traceparent(header) is None


@given(
    trace_id=st.binary(min_size=16, max_size=16).filter(any),
    span_id=st.integers(1, 2**64 - 1),
    sampled=st.booleans(),
)
def test_what_is_written_is_read_back(trace_id, span_id, sampled):
    header = format_traceparent(trace_id, span_id, sampled)
    assert len(header) == 55
    assert parse_traceparent(header) == (trace_id, span_id, sampled)


def test_new_ids_are_valid_and_differ():
    assert len({new_trace_id() for _ in range(100)}) == 100
    span_ids = {new_span_id() for _ in range(100)}
    assert len(span_ids) == 100
    assert all(span_id_from_bytes(span_id_to_bytes(span_id)) == span_id for span_id in span_ids)
    assert span_id_from_bytes(b"") == 0


@given(trace_id=st.binary(min_size=16, max_size=16), ratio=st.floats(0, 1))
def test_sampling_agrees_with_the_sampler_of_opentelemetry(trace_id, ratio):
    result = TraceIdRatioBased(ratio).should_sample(None, int.from_bytes(trace_id, "big"), "any")
    assert is_sampled(trace_id, ratio) is (result.decision is Decision.RECORD_AND_SAMPLE)
