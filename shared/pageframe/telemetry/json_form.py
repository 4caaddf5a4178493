"""OTLP spans as JSON, in the very characters of OpenTelemetry's own encoder.

Ids are hexadecimal, 64-bit integers are strings, and what JSON cannot carry in ASCII is escaped.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from opentelemetry.exporter.otlp.json.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from pageframe.telemetry import spans as names
from pageframe.telemetry.mapping import any_span
from pageframe.telemetry.span_form import Memo

_NUM_IDS_REMEMBERED_MAX: Final = 1 << 17
_NUM_RESOURCES_REMEMBERED_MAX: Final = 64
_SPAN_END: Final = b',"status":{}}'
_NO_SPANS: Final = b'"spans":[]'


class JsonForm:
    """See ``SpanForm``. Requests are lines, with their end, of an OTLP JSON file."""

    def __init__(self) -> None:
        self._array_items = Memo(_int_value, _NUM_IDS_REMEMBERED_MAX)
        self._envelopes = Memo(_envelope, _NUM_RESOURCES_REMEMBERED_MAX)
        self._first_attribute = b'"attributes":[{"key":"%s","value":{"intValue":"%%d"}}' % (
            names.KV_OPERATION.encode()
        )

    def trace(self, trace_id: bytes) -> bytes:
        """See ``SpanForm``."""
        return b'{"traceId":"%s","spanId":"' % trace_id.hex().encode()

    def span_id(self, span_id: int) -> bytes:
        """See ``SpanForm``."""
        return b"%016x" % span_id

    def parent(self, span_id: int) -> bytes:
        """See ``SpanForm``."""
        return b'","parentSpanId":"%016x","flags":256,' % span_id

    def name(self, name: str) -> bytes:
        """See ``SpanForm``."""
        return b'"name":%s,"kind":1,' % _text(name)

    def instant(self, time_ns: int) -> bytes:
        """See ``SpanForm``."""
        return b'"startTimeUnixNano":"%d","endTimeUnixNano":"%d",' % (time_ns, time_ns)

    def first_attribute(self, number: int) -> bytes:
        """See ``SpanForm``."""
        return self._first_attribute % number

    def attribute(self, key: str, value: int | str) -> bytes:
        """See ``SpanForm``."""
        if isinstance(value, str):
            return b',{"key":%s,"value":{"stringValue":%s}}' % (_text(key), _text(value))
        return b',{"key":%s,"value":%s}' % (_text(key), _int_value(value))

    def id_list(self, key: str) -> Callable[[Sequence[int]], bytes]:
        """See ``SpanForm``."""
        items, head = self._array_items, b',{"key":%s,"value":{"arrayValue":{' % _text(key)

        def write(ids: Sequence[int]) -> bytes:
            if not ids:
                return head + b"}}}"
            return b'%s"values":[%s]}}}' % (head, b",".join([items[number] for number in ids]))

        return write

    def link(self, trace_id: bytes, span_id: int) -> bytes:
        """See ``SpanForm``."""
        ids = trace_id.hex().encode(), span_id
        return b',"links":[{"traceId":"%s","spanId":"%016x","flags":256}]' % ids

    def span(self, parts: Iterable[bytes], link: bytes = b"") -> bytes:
        """See ``SpanForm``."""
        return b"".join(parts) + b"]" + link + _SPAN_END

    def spans(self, spans: Sequence[ReadableSpan]) -> list[bytes]:
        """See ``SpanForm``."""
        return [
            _line(span.to_dict())
            for resource_spans in encode_spans(spans).resource_spans
            for scope_spans in resource_spans.scope_spans
            for span in scope_spans.spans
        ]

    def request(self, resource: Resource, entries: Sequence[bytes]) -> bytes:
        """See ``SpanForm``."""
        before, after = self._envelopes[resource]
        return before + b",".join(entries) + after


def _envelope(resource: Resource) -> tuple[bytes, bytes]:
    """What stands before and after the spans of a line.

    Taken from what the official encoder made around one span.
    """
    request: dict[str, Any] = encode_spans([any_span(resource)]).to_dict()
    request["resourceSpans"][0]["scopeSpans"][0]["spans"] = []
    # Inside a text the quotes would be escaped, so this is found where it is meant.
    before, _, after = _line(request).partition(_NO_SPANS)
    return before + _NO_SPANS[:-1], _NO_SPANS[-1:] + after + b"\n"


def _int_value(number: int) -> bytes:
    return b'{"intValue":"%d"}' % number


def _text(text: str) -> bytes:
    return json.dumps(text).encode()


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
