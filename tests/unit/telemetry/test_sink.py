"""The sink: numbering, drops, sampling, waiting under audit."""

import threading
import time
from pathlib import Path

import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.errors import InvalidRequestError
from pageframe.core.trace import KvCause, KvOperation, NullTraceSink, TraceMode
from pageframe.telemetry.context import is_sampled
from pageframe.telemetry.records import KvRecord
from pageframe.telemetry.ring import RingReader, RingWriter
from pageframe.telemetry.sink import LockedRingTraceSink, RingTraceSink, SilentTraceSink
from pageframe.telemetry.span_records import SpanRecord
from unit.telemetry.records_of import read_all

TRACE_ID = bytes(range(16))
SPAN_ID = bytes(range(8))


def make_ring(path: Path, mode: TraceMode, capacity_bytes: int = 4096) -> RingWriter:
    return RingWriter(
        path, service_name="s", mode=mode, incarnation=1, capacity_bytes=capacity_bytes
    )


def record_kv(sink, sequence_id=0, block_ids=(1,), cause=KvCause.DECODE, **fields):
    defaults = {"generation": 0, "position": 0, "step": 1, "num_free_after": 9}
    sink.kv(
        KvOperation.ALLOCATE,
        cause,
        sequence_id=sequence_id,
        block_ids=block_ids,
        **(defaults | fields),
    )


def record_span(sink, trace_id=TRACE_ID, attributes=None):
    sink.span(
        "decode",
        trace_id=trace_id,
        span_id=3,
        parent_span_id=2,
        start_ns=1,
        end_ns=2,
        attributes=attributes or {},
    )


def test_off_gives_a_sink_that_keeps_nothing(tmp_path):
    sink = RingTraceSink.create(tmp_path / "ring", "s", TraceMode.OFF)
    assert isinstance(sink, NullTraceSink)
    record_kv(sink)
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_a_disabled_sdk_turns_any_mode_off(tmp_path):
    sink = RingTraceSink.create(
        tmp_path / "ring", "s", TraceMode.AUDIT, environment={"OTEL_SDK_DISABLED": "TRUE"}
    )
    assert isinstance(sink, SilentTraceSink)


def test_a_sequence_gives_its_context_to_its_records_until_it_ends(tmp_path):
    sink = RingTraceSink.create(tmp_path / "ring", "s", TraceMode.ALL)
    sink.sequence_begin(5, trace_id=TRACE_ID, span_id=SPAN_ID, request_id="r", tenant="acme")
    record_kv(sink, sequence_id=5)
    sink.sequence_end(5)
    record_kv(sink, sequence_id=5)
    inside, after = read_all(RingReader(tmp_path / "ring"))
    assert (inside.trace_id, inside.span_id, inside.tenant) == (
        TRACE_ID,
        int.from_bytes(SPAN_ID, "big"),
        "acme",
    )
    assert (after.trace_id, after.span_id, after.tenant) == (bytes(16), 0, "")
    assert after.sequence_id == 5


def test_records_carry_the_time_of_the_clock(tmp_path):
    clock = ManualClock(123)
    sink = RingTraceSink(
        make_ring(tmp_path / "ring", TraceMode.ALL), mode=TraceMode.ALL, clock=clock
    )
    record_kv(sink)
    clock.advance_ns(7)
    record_kv(sink)
    assert [record.time_ns for record in read_all(RingReader(tmp_path / "ring"))] == [123, 130]


def test_a_full_ring_drops_counts_and_leaves_a_gap_of_that_size(tmp_path):
    sink = RingTraceSink.create(tmp_path / "ring", "s", TraceMode.ALL, capacity_bytes=4096)
    reader = RingReader(tmp_path / "ring")
    for _ in range(100):
        record_kv(sink)
    before = read_all(reader)
    reader.commit()
    record_kv(sink)
    (after,) = read_all(reader)
    assert [record.number for record in before] == list(range(1, len(before) + 1))
    assert after.number == 101
    assert sink.num_dropped == reader.num_dropped == 100 - len(before) > 0


def test_a_span_too_large_for_the_ring_is_counted_as_dropped(tmp_path):
    sink = RingTraceSink.create(tmp_path / "ring", "s", TraceMode.AUDIT, capacity_bytes=4096)
    record_span(sink, attributes={"text": "x" * 4096})
    record_span(sink)
    assert sink.num_dropped == 1
    (span,) = read_all(RingReader(tmp_path / "ring"))
    assert isinstance(span, SpanRecord)


def test_more_blocks_than_a_record_holds_become_several_operations(tmp_path):
    sink = RingTraceSink.create(tmp_path / "ring", "s", TraceMode.ALL, capacity_bytes=8192)
    reader = RingReader(tmp_path / "ring")
    sources, targets = list(range(600)), list(range(1000, 1600))
    record_kv(sink, block_ids=sources, target_ids=targets)
    records = read_all(reader)
    assert [record.number for record in records] == list(range(1, len(records) + 1))
    assert len(records) > 1
    assert sum((record.block_ids for record in records), ()) == tuple(sources)
    assert sum((record.target_ids for record in records), ()) == tuple(targets)
    assert all(len(record.block_ids) == len(record.target_ids) for record in records)


def test_thousands_of_blocks_fit_into_one_record(tmp_path):
    sink = RingTraceSink.create(tmp_path / "ring", "s", TraceMode.ALL)
    record_kv(sink, block_ids=range(65_536))
    (record,) = read_all(RingReader(tmp_path / "ring"))
    assert record.block_ids == tuple(range(65_536))


def test_a_span_of_an_untraced_request_is_not_recorded(tmp_path):
    sink = RingTraceSink.create(tmp_path / "ring", "s", TraceMode.ALL)
    record_span(sink, trace_id=b"")
    assert read_all(RingReader(tmp_path / "ring")) == []
    assert sink.num_dropped == 0


def test_sampling_keeps_a_trace_whole_or_not_at_all(tmp_path):
    sink = RingTraceSink.create(tmp_path / "ring", "s", TraceMode.SAMPLED, sample_ratio=0.5)
    kept, lost = b"\1" * 16, b"\xff" * 16
    assert (is_sampled(kept, 0.5), is_sampled(lost, 0.5)) == (True, False)
    for sequence_id, trace_id in ((1, kept), (2, lost), (3, b"")):
        sink.sequence_begin(
            sequence_id, trace_id=trace_id, span_id=SPAN_ID, request_id="", tenant=""
        )
        record_kv(sink, sequence_id=sequence_id)
    record_span(sink, trace_id=kept)
    record_span(sink, trace_id=lost)
    kv, span = read_all(RingReader(tmp_path / "ring"))
    assert isinstance(kv, KvRecord)
    assert (kv.sequence_id, kv.number, span.trace_id) == (1, 1, kept)


def test_sampling_keeps_what_is_rare_and_serves_no_request(tmp_path):
    sink = RingTraceSink.create(tmp_path / "ring", "s", TraceMode.SAMPLED, sample_ratio=0.0)
    record_kv(sink, cause=KvCause.STEP_COMPLETED)
    record_kv(sink, cause=KvCause.INTEGRITY)
    (record,) = read_all(RingReader(tmp_path / "ring"))
    assert record.cause is KvCause.INTEGRITY


def test_the_sample_ratio_comes_from_the_standard_variable(tmp_path):
    sink = RingTraceSink.create(
        tmp_path / "ring",
        "s",
        TraceMode.SAMPLED,
        environment={"OTEL_TRACES_SAMPLER_ARG": "1.0"},
    )
    record_span(sink, trace_id=b"\xff" * 16)
    assert len(read_all(RingReader(tmp_path / "ring"))) == 1


@pytest.mark.parametrize("text", ["often", "1.5", "-0.1", "nan"])
def test_a_sample_ratio_that_is_none_is_an_error_that_names_the_variable(tmp_path, text):
    with pytest.raises(InvalidRequestError, match="OTEL_TRACES_SAMPLER_ARG"):
        RingTraceSink.create(
            tmp_path / "ring",
            "s",
            TraceMode.SAMPLED,
            environment={"OTEL_TRACES_SAMPLER_ARG": text},
        )


def test_audit_waits_for_the_reader_and_loses_nothing(tmp_path):
    ring = make_ring(tmp_path / "ring", TraceMode.AUDIT)
    reader = RingReader(tmp_path / "ring")
    read = []

    def sleep(seconds: float) -> None:
        read.extend(read_all(reader))
        reader.commit()

    sink = RingTraceSink(ring, mode=TraceMode.AUDIT, sleep=sleep)
    for _ in range(500):
        record_kv(sink)
    read += read_all(reader)
    assert [record.number for record in read] == list(range(1, 501))
    assert sink.num_dropped == 0


def test_audit_gives_up_on_a_reader_that_is_gone_and_trusts_it_again_when_it_is_back(tmp_path):
    ring = make_ring(tmp_path / "ring", TraceMode.AUDIT)
    reader = RingReader(tmp_path / "ring")
    sleeps: list[float] = []
    sink = RingTraceSink(ring, mode=TraceMode.AUDIT, sleep=sleeps.append)
    while sink.num_dropped == 0:
        record_kv(sink)
    assert 9.9 < sum(sleeps) < 10.1
    num_sleeps = len(sleeps)
    record_kv(sink)
    assert (sink.num_dropped, len(sleeps)) == (2, num_sleeps)
    read_all(reader)
    reader.commit()
    record_kv(sink)
    assert len(read_all(reader)) == 1
    assert sink.num_dropped == 2


def test_threads_share_a_locked_sink_and_numbers_follow_the_order_in_the_ring(tmp_path):
    sink = LockedRingTraceSink.create(tmp_path / "ring", "s", TraceMode.ALL)
    assert isinstance(sink, LockedRingTraceSink)

    def work() -> None:
        for _ in range(2000):
            record_kv(sink)
            record_span(sink)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = read_all(RingReader(tmp_path / "ring"))
    numbers = [record.number for record in records if isinstance(record, KvRecord)]
    assert numbers == list(range(1, 6001))
    spans = [record for record in records if isinstance(record, SpanRecord)]
    assert sum(span.name == "decode" for span in spans) == 6000


def test_the_default_ring_holds_a_second_of_fifty_thousand_operations(tmp_path):
    """An exporter that is busy for a second loses nothing, whatever the mode."""
    sink = RingTraceSink.create(tmp_path / "ring", "s", TraceMode.ALL)
    sink.sequence_begin(1, trace_id=TRACE_ID, span_id=SPAN_ID, request_id="", tenant="t" * 64)
    for number in range(50_000):
        record_kv(sink, sequence_id=1, block_ids=[number, 1, 2, 3], target_ids=[4, 5, 6, 7])
    assert sink.num_dropped == 0


def test_the_ring_gets_the_time_of_the_machine_when_no_clock_is_given(tmp_path):
    sink = RingTraceSink.create(tmp_path / "ring", "s", TraceMode.ALL)
    before_ns = time.time_ns()
    record_kv(sink)
    after_ns = time.time_ns()
    (record,) = read_all(RingReader(tmp_path / "ring"))
    # The clock of the sink never steps back; the machine's may be set in between, by an hour.
    assert abs(record.time_ns - before_ns) < 3_600_000_000_000 + after_ns - before_ns


@pytest.mark.parametrize("num_blocks", [0, 1, 2, 300])
@pytest.mark.parametrize("num_targets", [0, 1, 300])
def test_every_shape_of_record_comes_back_also_the_second_time(tmp_path, num_blocks, num_targets):
    sink = RingTraceSink.create(tmp_path / "ring", "s", TraceMode.ALL)
    blocks, targets = tuple(range(num_blocks)), tuple(range(500, 500 + num_targets))
    for _ in range(2):
        record_kv(sink, block_ids=blocks, target_ids=targets)
    for record in read_all(RingReader(tmp_path / "ring")):
        assert (record.block_ids, record.target_ids) == (blocks, targets)
