"""OTLP spans as protobuf, written byte by byte.

The format is so plain that writing it takes less than making the objects that would write it. Of
a field, the tag says its number and type, and then comes a varint, 4 or 8 bytes, or a length and
as many bytes. Numbers and types are those of ``opentelemetry/proto/trace/v1/trace.proto`` and
``common/v1/common.proto``; a test reads what is written here with the official classes.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from pageframe.telemetry import spans as names
from pageframe.telemetry.mapping import any_span
from pageframe.telemetry.memo import Memo
from pageframe.telemetry.span_form import column_writer
from pageframe.telemetry.span_records import ColumnType

_NUM_IDS_REMEMBERED_MAX: Final = 1 << 17
_NUM_KEYS_MAX: Final = 1024
_NUM_LENGTHS_REMEMBERED_MAX: Final = 4096
_NUM_RESOURCES_REMEMBERED_MAX: Final = 64

# Tags: field number times 8, plus 0 for a varint, 1 for 8 bytes, 2 for a length, 5 for 4 bytes.
_REQUEST_RESOURCE_SPANS: Final = b"\x0a"
_RESOURCE_SPANS_SCOPE_SPANS: Final = b"\x12"
_SCOPE_SPANS_SPAN: Final = b"\x12"
_SPAN_NAME: Final = b"\x2a"
_SPAN_ATTRIBUTE: Final = b"\x4a"
_SPAN_LINK: Final = b"\x6a"
_KEY: Final = b"\x0a"
_VALUE: Final = b"\x12"
_STRING_VALUE: Final = b"\x0a"
_BOOL_VALUE: Final = b"\x10"
_INT_VALUE: Final = b"\x18"
_DOUBLE_VALUE: Final = b"\x21"
_ARRAY_VALUE: Final = b"\x2a"
_ARRAY_ITEM: Final = b"\x0a"

_TRACE_ID_HEAD: Final = b"\x0a\x10"
_SPAN_ID: Final = struct.Struct(">2sQ")
_SPAN_ID_HEAD: Final = b"\x12\x08"
_PARENT_ID_HEAD: Final = b"\x22\x08"
_KIND_INTERNAL: Final = b"\x30\x01"
_KIND_SERVER: Final = b"\x30\x02"
_INSTANT: Final = struct.Struct("<cQcQ")
_START_TIME: Final = b"\x39"
_END_TIME: Final = b"\x41"
_TIME: Final = struct.Struct("<cQ")
_DOUBLE: Final = struct.Struct("<d")
_STATUS: Final = b"\x7a"
_STATUS_MESSAGE: Final = b"\x12"
_STATUS_CODE_ERROR: Final = b"\x18\x02"
# The flag that says that it is known whether the parent is remote.
_FLAGS: Final = b"\x85\x01" + struct.pack("<I", 0x100)
# An unset status, and that flag.
_SPAN_END: Final = b"\x7a\x00" + _FLAGS
# The same flag of a link.
_LINK_END: Final = b"\x35" + struct.pack("<I", 0x100)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


_NUM_LOW_BITS: Final = 14
_LOW_MASK: Final = (1 << _NUM_LOW_BITS) - 1
_MASK_64: Final = (1 << 64) - 1
_NUM_VARINT_BYTES_MAX: Final = 10
_SHORT_MAX: Final = (1 << 2 * _NUM_LOW_BITS) - 1
# All varints of up to two bytes, and the same bytes with more to follow.
_SHORT_VARINTS: Final = [_varint(number) for number in range(1 << _NUM_LOW_BITS)]
_LOW_VARINTS: Final = [
    bytes((number & 0x7F | 0x80, number >> 7 | 0x80)) for number in range(1 << _NUM_LOW_BITS)
]


def _sized(tag: bytes, content: bytes) -> bytes:
    """A field that has a length."""
    num_bytes = len(content)
    length = _SHORT_VARINTS[num_bytes] if num_bytes <= _LOW_MASK else _varint(num_bytes)
    return tag + length + content


class ProtobufForm:
    """See ``SpanForm``. Requests are ``ExportTraceServiceRequest`` messages."""

    def __init__(self) -> None:
        self._array_items = Memo(_array_item, _NUM_IDS_REMEMBERED_MAX)
        self._high_varints = Memo(_varint, 1 << _NUM_LOW_BITS)
        self._keys: Memo[str, bytes] = Memo(_key, _NUM_KEYS_MAX)
        # What writes a column is the same in all shapes, and so are the texts that it remembers.
        self._columns: Memo[tuple[str, ColumnType], Callable[[Any], bytes]] = Memo(
            lambda column: _column(self._keys[column[0]], column[1]), _NUM_KEYS_MAX
        )
        self._envelopes = Memo(_envelope, _NUM_RESOURCES_REMEMBERED_MAX)
        # By the length of the number's varint: what stands before it.
        self._first_attribute_heads = _int_heads(self._keys[names.KV_OPERATION])

    def trace(self, trace_id: bytes) -> bytes:
        """See ``SpanForm``."""
        return _TRACE_ID_HEAD + trace_id

    def span_id(self, span_id: int) -> bytes:
        """See ``SpanForm``."""
        return _SPAN_ID.pack(_SPAN_ID_HEAD, span_id)

    def parent(self, span_id: int) -> bytes:
        """See ``SpanForm``."""
        return _SPAN_ID.pack(_PARENT_ID_HEAD, span_id) if span_id else b""

    def name(self, name: str, *, is_server: bool = False) -> bytes:
        """See ``SpanForm``."""
        written = _sized(_SPAN_NAME, name.encode()) if name else b""
        return written + (_KIND_SERVER if is_server else _KIND_INTERNAL)

    def instant(self, time_ns: int) -> bytes:
        """See ``SpanForm``."""
        return _INSTANT.pack(_START_TIME, time_ns, _END_TIME, time_ns)

    def interval(self, start_ns: int, end_ns: int) -> bytes:
        """See ``SpanForm``."""
        if start_ns and end_ns:
            return _INSTANT.pack(_START_TIME, start_ns, _END_TIME, end_ns)
        start = _TIME.pack(_START_TIME, start_ns) if start_ns else b""
        return start + (_TIME.pack(_END_TIME, end_ns) if end_ns else b"")

    def first_attribute(self, number: int) -> bytes:
        """See ``SpanForm``."""
        if number <= _LOW_MASK:
            written = _SHORT_VARINTS[number]
        else:
            written = _LOW_VARINTS[number & _LOW_MASK] + self._high_varints[number >> _NUM_LOW_BITS]
        return self._first_attribute_heads[len(written)] + written

    def attribute(self, key: str, value: int | str) -> bytes:
        """See ``SpanForm``."""
        return _sized(_SPAN_ATTRIBUTE, self._keys[key] + _sized(_VALUE, _any_value(value)))

    def columns(
        self, columns: Sequence[tuple[str, ColumnType]]
    ) -> Sequence[Callable[[Any], bytes]]:
        """See ``SpanForm``."""
        return [self._columns[column] for column in columns]

    def id_list(self, key: str) -> Callable[[Sequence[int]], bytes]:
        """See ``SpanForm``."""
        items, written_key = self._array_items, self._keys[key]

        def head(num_array_bytes: int) -> bytes:
            array = _sized(_ARRAY_VALUE, bytes(num_array_bytes))
            return _head(written_key, array[: len(array) - num_array_bytes], num_array_bytes)

        def write_one(number: int) -> bytes:
            item = items[number]
            return heads[len(item)] + item

        heads = Memo(head, _NUM_LENGTHS_REMEMBERED_MAX)
        # Most operations are on one block.
        single = Memo(write_one, _NUM_IDS_REMEMBERED_MAX)

        def write(ids: Sequence[int]) -> bytes:
            if len(ids) == 1:
                return single[ids[0]]
            array = b"".join([items[number] for number in ids])
            return heads[len(array)] + array

        return write

    def link(self, trace_id: bytes, span_id: int) -> bytes:
        """See ``SpanForm``."""
        return _link(trace_id, span_id)

    def span(self, parts: Iterable[bytes], link: bytes = b"") -> bytes:
        """See ``SpanForm``."""
        written = b"".join(parts) + link + _SPAN_END
        num_bytes = len(written)
        if num_bytes > _LOW_MASK:
            return _sized(_SCOPE_SPANS_SPAN, written)
        return _SCOPE_SPANS_SPAN + _SHORT_VARINTS[num_bytes] + written

    def finished_span(
        self, parts: Iterable[bytes], links: Sequence[tuple[bytes, int]], error: bytes
    ) -> bytes:
        """See ``SpanForm``."""
        end = _SPAN_END
        if error:
            end = _sized(_STATUS, _sized(_STATUS_MESSAGE, error) + _STATUS_CODE_ERROR) + _FLAGS
        written = b"".join((*parts, *[_link(*link) for link in links], end))
        return _sized(_SCOPE_SPANS_SPAN, written)

    def spans(self, spans: Sequence[ReadableSpan]) -> list[bytes]:
        """See ``SpanForm``."""
        return [
            _sized(_SCOPE_SPANS_SPAN, span.SerializeToString())
            for resource_spans in encode_spans(spans).resource_spans
            for scope_spans in resource_spans.scope_spans
            for span in scope_spans.spans
        ]

    def request(self, resource: Resource, entries: Sequence[bytes]) -> bytes:
        """See ``SpanForm``."""
        resource_fields, scope_fields = self._envelopes[resource]
        scope_spans = b"".join((scope_fields, *entries))
        resource_spans = resource_fields + _sized(_RESOURCE_SPANS_SCOPE_SPANS, scope_spans)
        return _sized(_REQUEST_RESOURCE_SPANS, resource_spans)


def _key(key: str) -> bytes:
    return _sized(_KEY, key.encode()) if key else b""


def _head(key: bytes, before: bytes, num_bytes: int) -> bytes:
    """What stands in an attribute before the last ``num_bytes`` of its value."""
    # A field's length is all that its head needs to know of what follows.
    whole = _sized(_SPAN_ATTRIBUTE, key + _sized(_VALUE, before + bytes(num_bytes)))
    return whole[: len(whole) - num_bytes]


def _int_heads(key: bytes) -> list[bytes]:
    """What stands before a number in an attribute, by the length of the number's varint."""
    return [_head(key, _INT_VALUE, length) for length in range(_NUM_VARINT_BYTES_MAX + 1)]


def _column(key: bytes, column: ColumnType) -> Callable[[Any], bytes]:
    """What writes an attribute."""

    def write(value: Any) -> bytes:
        return _sized(_SPAN_ATTRIBUTE, key + _sized(_VALUE, _any_value(value)))

    def write_int(value: int) -> bytes:
        if 0 <= value <= _LOW_MASK:
            written = _SHORT_VARINTS[value]
        elif 0 < value <= _SHORT_MAX:
            written = _LOW_VARINTS[value & _LOW_MASK] + _SHORT_VARINTS[value >> _NUM_LOW_BITS]
        else:
            written = _varint(value & _MASK_64)
        return int_heads[len(written)] + written

    match column:
        case ColumnType.INTEGER:
            int_heads = _int_heads(key)
            return write_int
        case ColumnType.NUMBER:
            head, pack = _head(key, _DOUBLE_VALUE, _DOUBLE.size), _DOUBLE.pack
            return lambda value: head + pack(value)
        case _:
            return column_writer(column, write)


def _any_value(value: Any) -> bytes:
    """An ``AnyValue``.

    Raises:
        TypeError: if it is none that an attribute may have.
    """
    if isinstance(value, bool):
        return _BOOL_VALUE + _varint(value)
    if isinstance(value, str):
        return _sized(_STRING_VALUE, value.encode())
    if isinstance(value, int):
        return _INT_VALUE + _varint(value & _MASK_64)
    if isinstance(value, float):
        return _DOUBLE_VALUE + _DOUBLE.pack(value)
    if isinstance(value, tuple):
        items = [_sized(_ARRAY_ITEM, _any_value(item)) for item in value]
        return _sized(_ARRAY_VALUE, b"".join(items))
    raise TypeError(f"an attribute cannot be {value!r}")


def _link(trace_id: bytes, span_id: int) -> bytes:
    ids = _TRACE_ID_HEAD + trace_id + _SPAN_ID.pack(_SPAN_ID_HEAD, span_id)
    return _sized(_SPAN_LINK, ids + _LINK_END)


def _array_item(number: int) -> bytes:
    return _sized(_ARRAY_ITEM, _INT_VALUE + _varint(number))


def _envelope(resource: Resource) -> tuple[bytes, bytes]:
    """All fields of ``ResourceSpans`` and of ``ScopeSpans`` but the spans.

    Taken from a message that the official encoder made around one span.
    """
    (resource_spans,) = encode_spans([any_span(resource)]).resource_spans
    (scope_spans,) = resource_spans.scope_spans
    scope_spans.ClearField("spans")
    scope_fields = scope_spans.SerializeToString()
    resource_spans.ClearField("scope_spans")
    return resource_spans.SerializeToString(), scope_fields
