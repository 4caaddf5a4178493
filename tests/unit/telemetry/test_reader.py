"""Reading trace files back, and drawing them."""

import json

import pytest

from pageframe.core.errors import InvalidRequestError, NotFoundError
from pageframe.telemetry.mapping import SpanMapper
from pageframe.telemetry.reader import Span, read_spans, spans_by_trace
from pageframe.telemetry.record_batch import Producer
from pageframe.telemetry.render import render_trace
from pageframe.telemetry.span_records import SpanRecord
from pageframe.telemetry.trace_files import TraceFiles

TRACE_ID = bytes(range(16))
MS = 1_000_000


def make_span(name, span_id, parent_span_id=0, start_ms=0, end_ms=0, error="", **attributes):
    return Span(
        service="s",
        trace_id=TRACE_ID,
        span_id=span_id,
        parent_span_id=parent_span_id,
        name=name,
        start_ns=start_ms * MS,
        end_ns=end_ms * MS,
        attributes={key.replace("__", "."): value for key, value in attributes.items()},
        error=error,
    )


def write(folder, *records, stem="pageframe"):
    mapper = SpanMapper(Producer("pageframe-scheduler", 1, 1))
    files = TraceFiles(folder, stem)
    for record in records:
        assert files.send(
            files.form.request(mapper.resource, files.form.spans(mapper.spans(record)))
        )
    files.close()


def test_a_span_written_is_the_span_read(tmp_path):
    record = SpanRecord(
        name="stall",
        trace_id=TRACE_ID,
        span_id=2**64 - 1,
        parent_span_id=7,
        start_ns=1_700_000_000_000_000_001,
        end_ns=1_700_000_000_002_500_001,
        attributes={
            "cause": "queue",
            "n": 2**62,
            "share": 0.5,
            "yes": True,
            "ids": [1, 2],
            "e": [],
        },
        links=((bytes(15) + b"\1", 9),),
        error="too late",
    )
    write(tmp_path, record)
    (span,) = read_spans(tmp_path / "pageframe.jsonl")
    assert span == Span(
        service="pageframe-scheduler",
        trace_id=TRACE_ID,
        span_id=2**64 - 1,
        parent_span_id=7,
        name="stall",
        start_ns=1_700_000_000_000_000_001,
        end_ns=1_700_000_000_002_500_001,
        attributes={
            "cause": "queue",
            "n": 2**62,
            "share": 0.5,
            "yes": True,
            "ids": (1, 2),
            "e": (),
        },
        links=((bytes(15) + b"\1", 9),),
        error="too late",
    )
    assert span.duration_ms == 2.5


def test_a_folder_is_read_whole_and_repetitions_are_told_by_their_id(tmp_path):
    def record(span_id):
        return SpanRecord(
            name="step",
            trace_id=TRACE_ID,
            span_id=span_id,
            parent_span_id=0,
            start_ns=10 - span_id,
            end_ns=10,
            attributes={},
        )

    write(tmp_path, record(1), record(2), stem="a")
    write(tmp_path, record(2), record(3), stem="b")
    assert [span.span_id for span in read_spans(tmp_path)] == [3, 2, 1]


def test_a_last_line_that_is_still_being_written_is_left_out(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"resourceSpans":[]}\n{"resourceSp')
    assert read_spans(tmp_path) == []


@pytest.mark.parametrize("line", ["{", "[]", '{"traces":[]}', '{"resourceSpans":[3]}'])
def test_a_line_that_is_no_trace_is_an_error_that_names_it(tmp_path, line):
    (tmp_path / "t.jsonl").write_text('{"resourceSpans":[]}\n' + line + "\n")
    with pytest.raises(InvalidRequestError, match=r"t\.jsonl line 2"):
        read_spans(tmp_path)


def test_an_error_status_of_other_tools_is_understood(tmp_path):
    span = {
        "traceId": TRACE_ID.hex(),
        "spanId": "0000000000000001",
        "name": "x",
        "startTimeUnixNano": 1,
        "endTimeUnixNano": "2",
        "status": {"code": "STATUS_CODE_ERROR"},
    }
    request = {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}
    (tmp_path / "t.jsonl").write_text(json.dumps(request) + "\n")
    (read,) = read_spans(tmp_path)
    assert (read.error, read.service, read.end_ns) == ("error", "", 2)


def test_no_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        read_spans(tmp_path / "nowhere")


def test_spans_are_grouped_by_trace():
    a, b = make_span("a", 1), make_span("b", 2)
    assert spans_by_trace([a, b]) == {TRACE_ID: [a, b]}


def test_a_trace_is_drawn_as_a_tree():
    spans = [
        make_span("kv.allocate", 5, 4, 190, 190, kv__block_ids=(3, 7, 8, 9), kv__cause="prefill"),
        make_span("generate", 1, 0, 0, 400, pageframe__finish_reason="stop"),
        make_span("sequence", 2, 1, 10, 400),
        make_span("stall", 3, 2, 10, 190, pageframe__stall__cause="kv_full"),
        make_span("prefill", 4, 2, 190, 250, pageframe__tokens__begin=0, pageframe__tokens__end=9),
        make_span(
            "kv.copy_on_write",
            6,
            2,
            300,
            300,
            error="no",
            kv__block_ids__source=(1,),
            kv__block_ids__target=(2,),
        ),
    ]
    assert render_trace(spans) == "\n".join(
        [
            f"trace {TRACE_ID.hex()}",
            "generate                        0.0 ms      400.0 ms  finish=stop",
            "└─ sequence                    10.0 ms      390.0 ms",
            "   ├─ stall                    10.0 ms      180.0 ms  cause=kv_full",
            "   ├─ prefill                 190.0 ms       60.0 ms  tokens=[0, 9)",
            "   │  └─ kv.allocate          190.0 ms        0.0 ms  blocks=3,7-9 (4) cause=prefill",
            "   └─ kv.copy_on_write        300.0 ms        0.0 ms  from=1 (1) to=2 (1) error='no'",
        ]
    )


def test_a_span_whose_parent_is_missing_stands_at_the_top_and_a_circle_is_no_trap():
    text = render_trace(
        [make_span("orphan", 1, 99), make_span("root", 2), make_span("child", 3, 2, 1, 1)]
    )
    assert text.count("\n") == 3
    assert "└─ child" in text
    assert "orphan" in text
    assert render_trace([make_span("self", 1, 1)]).startswith("trace ")


def test_a_very_deep_trace_is_drawn():
    spans = [make_span("s", index + 1, index) for index in range(3000)]
    assert render_trace(spans).count("\n") == 3000


def test_no_spans_draw_nothing():
    assert render_trace([]) == ""
