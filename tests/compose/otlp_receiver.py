"""Stands where Jaeger stands: takes spans by OTLP on port 4317 and tells them on 16686.

``GET /spans?trace=HEX`` answers with the spans of a trace as JSON, in the order of arrival:
``[{"service", "name", "span", "parent", "attributes"}]``, ids in hex.
"""

import json
import os
import signal
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

MESSAGE_BYTES_MAX = 64 << 20
Spans = list[dict[str, Any]]


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps spans by trace, for as long as it lives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans_by_trace: defaultdict[str, Spans] = defaultdict(list)

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802, gRPC's
        with self._lock:
            for resource in request.resource_spans:
                service = plain(resource.resource.attributes).get("service.name", "")
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        self._spans_by_trace[span.trace_id.hex()].append(told(service, span))
        return trace_service_pb2.ExportTraceServiceResponse()

    def of_trace(self, trace_id: str) -> Spans:
        with self._lock:
            return list(self._spans_by_trace.get(trace_id, []))


def plain(attributes: Any) -> dict[str, Any]:
    """OTLP attributes as a mapping; of arrays only their length is told."""
    values = {}
    for item in attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind) if kind else None
        values[item.key] = value if isinstance(value, str | int | float | bool) else str(kind)
    return values


def told(service: str, span: Any) -> dict[str, Any]:
    return {
        "service": service,
        "name": span.name,
        "span": span.span_id.hex(),
        "parent": span.parent_span_id.hex(),
        "attributes": plain(span.attributes),
    }


def make_handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            trace_id = parse_qs(urlsplit(self.path).query).get("trace", [""])[0]
            body = json.dumps(receiver.of_trace(trace_id)).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    return Handler


def main() -> None:
    # The first process of a container has no default action for signals.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    receiver = Receiver()
    options = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)]
    server = grpc.server(ThreadPoolExecutor(4), options=options)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    server.add_insecure_port("0.0.0.0:4317")
    server.start()
    ThreadingHTTPServer(("0.0.0.0", 16686), make_handler(receiver)).serve_forever()


if __name__ == "__main__":
    main()
