"""A client of an OTLP collector: one request, one attempt, one answer.

It is OpenTelemetry's own gRPC exporter, so all ``OTEL_EXPORTER_OTLP_*`` variables (endpoint,
headers, timeout, compression, certificates) mean what they mean everywhere. Two things are not
taken from it. Retrying: it would hold batches in memory, while here they wait in the spool. And
messages: requests are encoded already, and go out as they are.
"""

import logging
from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.export import SpanExportResult

from pageframe.telemetry.protobuf_form import ProtobufForm
from pageframe.telemetry.span_form import SpanForm

_METHOD = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


class _RequestStub:
    """The collector's service for requests that are bytes; the answer is not looked into."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.Export: Any = channel.unary_unary(_METHOD, None, None)


class _RequestExporter(OTLPSpanExporter):  # type: ignore[misc]  # untyped base
    """The gRPC exporter, given requests that are encoded already."""

    def _initialize_channel_and_stub(self) -> None:
        super()._initialize_channel_and_stub()
        self._client = _RequestStub(self._channel)

    def _translate_data(self, data: Any) -> Any:
        return data

    def _count_data(self, data: Any) -> int:
        return 0  # For metrics of the SDK, which are not collected in this process.


class OtlpClient:
    """Sends requests to the collector that the environment names."""

    def __init__(self) -> None:
        self.form: SpanForm = ProtobufForm()
        # The exporter logs each failure at error level; the sender says it once per outage.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        # An iterator, because an empty set would be taken for "not given": retry nothing.
        self._exporter = _RequestExporter(retryable_error_codes=iter(()))

    def send(self, request: bytes) -> bool:
        """Send one encoded ``ExportTraceServiceRequest``; whether the collector took it."""
        return bool(self._exporter.export(request) is SpanExportResult.SUCCESS)

    def is_reachable(self) -> bool:
        """Whether the collector takes a request without spans."""
        return self.send(b"")

    def close(self) -> None:
        """Close the channel; a call in flight is cancelled."""
        self._exporter.shutdown()
