"""OTLP JSON lines: whole lines, whatever breaks, and not too many of them."""

import json

import pytest
from opentelemetry.proto_json.collector.trace.v1.trace_service import (
    ExportTraceServiceRequest as JsonExportTraceServiceRequest,
)

from pageframe.telemetry.mapping import SpanMapper
from pageframe.telemetry.reader import read_spans
from pageframe.telemetry.span_records import SpanRecord
from pageframe.telemetry.trace_files import TraceFiles
from unit.telemetry.records_of import EXECUTOR


def make_line(files, *span_ids):
    mapper = SpanMapper(EXECUTOR)
    spans = [
        mapper.spans(
            SpanRecord(
                name="step",
                trace_id=bytes(15) + b"\1",
                span_id=span_id,
                parent_span_id=0,
                start_ns=span_id,
                end_ns=span_id,
                attributes={"ids": [1, 2]},
            )
        )[0]
        for span_id in span_ids
    ]
    return files.form.request(mapper.resource, files.form.spans(spans))


def span_ids_at(path):
    return [span.span_id for span in read_spans(path)]


def test_each_line_is_an_export_request(tmp_path):
    files = TraceFiles(tmp_path, "pageframe")
    assert files.send(make_line(files, 1, 2))
    assert files.send(make_line(files, 3))
    files.close()
    lines = (tmp_path / "pageframe.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        request = JsonExportTraceServiceRequest.from_dict(json.loads(line))
        assert request.resource_spans[0].scope_spans[0].spans
    assert span_ids_at(tmp_path) == [1, 2, 3]


def test_a_line_torn_by_a_kill_is_cut_off_before_more_is_written(tmp_path):
    path = tmp_path / "pageframe.jsonl"
    files = TraceFiles(tmp_path, "pageframe")
    files.send(make_line(files, 1))
    files.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"resourceSpans":[' + b"x" * 100_000)
    files = TraceFiles(tmp_path, "pageframe")
    assert path.read_bytes() == whole
    files.send(make_line(files, 2))
    files.close()
    assert span_ids_at(path) == [1, 2]


@pytest.mark.parametrize("content", [b"", b"torn"])
def test_a_file_without_any_whole_line_is_emptied(tmp_path, content):
    (tmp_path / "pageframe.jsonl").write_bytes(content)
    TraceFiles(tmp_path, "pageframe").close()
    assert (tmp_path / "pageframe.jsonl").read_bytes() == b""


def test_full_files_are_put_aside_and_only_the_newest_kept(tmp_path):
    files = TraceFiles(tmp_path, "p", file_bytes_max=1, num_files_max=3)
    for span_id in range(1, 8):
        files.send(make_line(files, span_id))
    files.close()
    assert len(list(tmp_path.glob("*.jsonl"))) == 3
    assert span_ids_at(tmp_path) == [6, 7]


class FullDisk:
    """A file that takes the beginning of a line and then no more."""

    closed = False

    def __init__(self, path):
        self._file = path.open("ab", buffering=0)

    def write(self, content):
        if self._file.tell() == 0:
            return self._file.write(content[:1000])
        raise OSError(28, "No space left on device")

    def close(self):
        self.closed = True


def test_a_line_that_could_not_be_written_whole_leaves_nothing_and_can_be_written_later(tmp_path):
    path = tmp_path / "p.jsonl"
    files = TraceFiles(tmp_path, "p")
    line = make_line(files, *range(1, 20))
    files._file = FullDisk(path)
    assert not files.send(line)
    assert path.stat().st_size == 1000
    assert files.is_reachable()
    assert files.send(line)
    files.close()
    assert path.read_bytes() == line
