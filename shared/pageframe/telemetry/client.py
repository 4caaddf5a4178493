"""The OTLP client: one encoded request, one attempt, one answer.

It is OpenTelemetry's own gRPC exporter, so all ``OTEL_EXPORTER_OTLP_*`` variables (endpoint,
headers, timeout, compression, certificates) mean what they mean everywhere. Only retrying is taken
from it: it would hold batches in memory, while here they wait in the spool.
"""

import logging
from typing import Any

from google.protobuf.message import DecodeError
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SpanExportResult


class _RequestExporter(OTLPSpanExporter):  # type: ignore[misc]  # untyped base
    """The gRPC exporter, given requests that are encoded already."""

    def _translate_data(self, data: Any) -> Any:
        return data

    def _count_data(self, data: Any) -> int:
        return sum(
            len(scope.spans) for resource in data.resource_spans for scope in resource.scope_spans
        )


class OtlpClient:
    """Sends requests to the collector that the environment names."""

    def __init__(self) -> None:
        # The exporter logs each failure at error level; the sender says it once per outage.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        # An iterator, because an empty set would be taken for "not given": retry nothing.
        self._exporter = _RequestExporter(retryable_error_codes=iter(()))

    def send(self, request: bytes) -> bool:
        """Send one encoded ``ExportTraceServiceRequest``; whether the collector took it.

        Raises:
            ValueError: if ``request`` is not one.
        """
        try:
            message = ExportTraceServiceRequest.FromString(request)
        except DecodeError as error:
            raise ValueError(f"not an export request: {error}") from error
        return bool(self._exporter.export(message) is SpanExportResult.SUCCESS)

    def is_reachable(self) -> bool:
        """Whether the collector takes a request without spans."""
        return self.send(b"")

    def close(self) -> None:
        """Close the channel; a call in flight is cancelled."""
        self._exporter.shutdown()
