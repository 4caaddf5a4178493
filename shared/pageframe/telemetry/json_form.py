"""OTLP spans as JSON, in the very characters of OpenTelemetry's own encoder.

Ids are hexadecimal, 64-bit integers are strings, and what JSON cannot carry in ASCII is escaped.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from opentelemetry.exporter.otlp.json.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from pageframe.telemetry import spans as names
from pageframe.telemetry.mapping import any_span
from pageframe.telemetry.memo import Memo
from pageframe.telemetry.span_form import column_writer
from pageframe.telemetry.span_records import ColumnType

_NUM_IDS_REMEMBERED_MAX: Final = 1 << 17
_NUM_RESOURCES_REMEMBERED_MAX: Final = 64
_NUM_COLUMNS_MAX: Final = 1024
_SPAN_END: Final = b',"status":{}}'
_FLAGS: Final = b'","flags":256,'
_NO_SPANS: Final = b'"spans":[]'


class JsonForm:
    """See ``SpanForm``. Requests are lines, with their end, of an OTLP JSON file."""

    def __init__(self) -> None:
        self._array_items = Memo(_int_value, _NUM_IDS_REMEMBERED_MAX)
        # What writes a column is the same in all shapes, and so are the texts that it remembers.
        self._columns = Memo(_column, _NUM_COLUMNS_MAX)
        self._envelopes = Memo(_envelope, _NUM_RESOURCES_REMEMBERED_MAX)
        self._first_attribute = b',"attributes":[{"key":"%s","value":{"intValue":"%%d"}}' % (
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
        return b'","parentSpanId":"%016x","flags":256,' % span_id if span_id else _FLAGS

    def name(self, name: str, *, is_server: bool = False) -> bytes:
        """See ``SpanForm``."""
        written = b'"name":%s,' % _text(name) if name else b""
        return b'%s"kind":%d' % (written, 2 if is_server else 1)

    def instant(self, time_ns: int) -> bytes:
        """See ``SpanForm``."""
        return b',"startTimeUnixNano":"%d","endTimeUnixNano":"%d"' % (time_ns, time_ns)

    def interval(self, start_ns: int, end_ns: int) -> bytes:
        """See ``SpanForm``."""
        if start_ns and end_ns:
            return b',"startTimeUnixNano":"%d","endTimeUnixNano":"%d"' % (start_ns, end_ns)
        start = b',"startTimeUnixNano":"%d"' % start_ns if start_ns else b""
        return start + (b',"endTimeUnixNano":"%d"' % end_ns if end_ns else b"")

    def first_attribute(self, number: int) -> bytes:
        """See ``SpanForm``."""
        return self._first_attribute % number

    def attribute(self, key: str, value: int | str) -> bytes:
        """See ``SpanForm``."""
        if isinstance(value, str):
            return b',{"key":%s,"value":{"stringValue":%s}}' % (_text(key), _text(value))
        return b',{"key":%s,"value":%s}' % (_text(key), _int_value(value))

    def columns(
        self, columns: Sequence[tuple[str, ColumnType]]
    ) -> Sequence[Callable[[Any], bytes]]:
        """See ``SpanForm``."""
        last = len(columns) - 1
        return [
            self._columns[key, column, at == 0, at == last]
            for at, (key, column) in enumerate(columns)
        ]

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
        return b',"links":[%s]' % _link(trace_id, span_id)

    def span(self, parts: Iterable[bytes], link: bytes = b"") -> bytes:
        """See ``SpanForm``."""
        return b"".join(parts) + b"]" + link + _SPAN_END

    def finished_span(
        self, parts: Iterable[bytes], links: Sequence[tuple[bytes, int]], error: bytes
    ) -> bytes:
        """See ``SpanForm``."""
        tail = b',"links":[%s]' % b",".join([_link(*link) for link in links]) if links else b""
        if error:
            status = b',"status":{"message":%s,"code":2}}' % _text(error.decode())
        else:
            status = _SPAN_END
        return b"".join(parts) + tail + status

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


def _link(trace_id: bytes, span_id: int) -> bytes:
    return b'{"traceId":"%s","spanId":"%016x","flags":256}' % (trace_id.hex().encode(), span_id)


def _column(at: tuple[str, ColumnType, bool, bool]) -> Callable[[Any], bytes]:
    """What writes an attribute: the key, the type, whether it is the first, and the last."""
    key, column, is_first, is_last = at
    written_key = b'"key":%s,' % _text(key) if key else b""
    before = b'%s{%s"value":' % (b',"attributes":[' if is_first else b",", written_key)
    after = b"}]" if is_last else b"}"

    def write(value: Any) -> bytes:
        return b"%s%s%s" % (before, _any_value(value), after)

    if column is ColumnType.INTEGER:
        return (before.replace(b"%", b"%%") + b'{"intValue":"%d"}' + after).__mod__
    return column_writer(column, write)


def _any_value(value: Any) -> bytes:
    """An ``AnyValue``.

    Raises:
        TypeError: if it is none that an attribute may have.
    """
    if isinstance(value, bool):
        return b'{"boolValue":true}' if value else b'{"boolValue":false}'
    if isinstance(value, str):
        return b'{"stringValue":%s}' % _text(value)
    if isinstance(value, int):
        return _int_value(value)
    if isinstance(value, float):
        return b'{"doubleValue":%s}' % _double(value)
    if isinstance(value, tuple):
        items = b",".join(map(_any_value, value))
        return b'{"arrayValue":{"values":[%s]}}' % items if items else b'{"arrayValue":{}}'
    raise TypeError(f"an attribute cannot be {value!r}")


def _double(value: float) -> bytes:
    if math.isfinite(value):
        return repr(value).encode()
    return b'"NaN"' if math.isnan(value) else b'"Infinity"' if value > 0 else b'"-Infinity"'


def _int_value(number: int) -> bytes:
    return b'{"intValue":"%d"}' % number


def _text(text: str) -> bytes:
    return json.dumps(text).encode()


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
