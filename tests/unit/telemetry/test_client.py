"""The client of a collector: bytes go out as they are, with the standard settings."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from pageframe.telemetry.client import OtlpClient

REQUEST = trace_service_pb2.ExportTraceServiceRequest()
REQUEST.resource_spans.add().scope_spans.add().spans.add(name="step")


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self.requests = []
        self.code = grpc.StatusCode.OK

    def Export(self, request, context):  # noqa: N802, the name is given by the protocol
        if self.code is not grpc.StatusCode.OK:
            context.abort(self.code, "no")
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector(monkeypatch):
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield collector
    server.stop(None).wait()


def test_a_request_arrives_as_it_was_encoded(collector):
    client = OtlpClient()
    assert client.send(REQUEST.SerializeToString())
    client.close()
    assert collector.requests == [REQUEST]


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INVALID_ARGUMENT], ids=str
)
def test_a_refusal_is_no_exception_and_is_not_tried_again(collector, code):
    client = OtlpClient()
    collector.code = code
    assert not client.send(REQUEST.SerializeToString())
    assert not client.is_reachable()
    collector.code = grpc.StatusCode.OK
    assert client.is_reachable()
    client.close()
    assert collector.requests == [trace_service_pb2.ExportTraceServiceRequest()]


def test_a_collector_that_is_not_there_takes_nothing(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    client = OtlpClient()
    assert not client.is_reachable()
    assert not client.send(REQUEST.SerializeToString())
    client.close()
