"""What is an export request, and what was cut off."""

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from pageframe.telemetry.client import OtlpClient, is_whole_request

REQUEST = ExportTraceServiceRequest()
for _name in ("short", "long" * 100):
    REQUEST.resource_spans.add().scope_spans.add().spans.add(name=_name)
WHOLE = REQUEST.SerializeToString()


def test_whole_requests_are_recognised():
    assert is_whole_request(WHOLE)
    assert is_whole_request(b"")


@pytest.mark.parametrize("num_bytes_lost", [1, 2, 100, 300])
def test_a_request_that_was_cut_off_is_not_whole(num_bytes_lost):
    assert not is_whole_request(WHOLE[:-num_bytes_lost])


@pytest.mark.parametrize("content", [b"x", b"\x0a", b"\x0a\x80", b"\x0a" + b"\xff" * 20, bytes(8)])
def test_other_bytes_are_no_request(content):
    assert not is_whole_request(content)


def test_what_is_no_request_is_refused_before_it_is_sent(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    client = OtlpClient()
    with pytest.raises(ValueError, match="3 bytes"):
        client.send(b"bad")
    client.close()


def test_a_collector_that_is_not_there_takes_nothing(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    client = OtlpClient()
    assert not client.is_reachable()
    assert not client.send(WHOLE)
    client.close()
