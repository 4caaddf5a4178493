"""Finished spans in a ring: each a row, with the names and types of its columns beside it.

Spans of one name have the same keys and types nearly always, as the rows of a table have the same
columns. So what says them is made once, as bytes, and a record is those bytes and the values::

    header, ids, times, sizes │ shape │ values │ texts │ links │ error
                                 │         └ 8 bytes a number, 1 a flag, 4 the length of a text
                                 └ JSON: name, types, keys

A record carries its shape, so it can be understood alone. Whoever reads many of them looks the
shape up as it is and parses it once, see ``span_encoder``.
"""

import enum
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from pageframe.core.trace import AttributeValue, NumberColumns, NumberRow
from pageframe.telemetry.memo import Memo
from pageframe.telemetry.ring import ALIGNMENT_BYTES, RecordKind

# Length, kind, trace, span, parent, start, end, sizes of shape and error, number of links.
SPAN_FIXED: Final = struct.Struct("<IHxx16sQQQQIII4x")
SPAN_LINK: Final = struct.Struct("<16sQ")
_NUM_LAYOUTS_REMEMBERED_MAX: Final = 1024
_SPAN: Final = int(RecordKind.SPAN)
# By what a record has beyond whole words.
_PADDINGS: Final = [bytes(-number % ALIGNMENT_BYTES) for number in range(ALIGNMENT_BYTES)]
_INT64_MIN: Final = -(1 << 63)
_INT64_MAX: Final = (1 << 63) - 1


@enum.unique
class ColumnType(enum.StrEnum):
    """Of an attribute: how its value lies in a record."""

    INTEGER = "q"
    NUMBER = "d"
    FLAG = "?"
    TEXT = "t"
    OTHER = "j"


_TYPE_OF: Final[Mapping[type, ColumnType]] = {
    int: ColumnType.INTEGER,
    float: ColumnType.NUMBER,
    bool: ColumnType.FLAG,
    str: ColumnType.TEXT,
}
# Of a text, in UTF-8 or as JSON, the column holds how many bytes it has.
_FORMAT_OF: Final[Mapping[ColumnType, str]] = {
    ColumnType.INTEGER: "q",
    ColumnType.NUMBER: "d",
    ColumnType.FLAG: "?",
    ColumnType.TEXT: "I",
    ColumnType.OTHER: "I",
}
_HAS_TEXT: Final = frozenset({ColumnType.TEXT, ColumnType.OTHER})
_encode_json = json.JSONEncoder(separators=(",", ":"), default=list).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRecord:
    """One finished span; fields as in ``core.trace.TraceSink.span``."""

    name: str
    trace_id: bytes
    span_id: int
    parent_span_id: int
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    links: tuple[tuple[bytes, int], ...] = ()
    error: str = ""


class _Layout(NamedTuple):
    """How records of one shape are packed.

    ``texts`` are the columns whose values have a length, and whether they are written as JSON.
    """

    pack: Callable[..., bytes]
    num_bytes: int
    shape: bytes
    texts: tuple[tuple[int, bool], ...]


def _layout(key: tuple[str, tuple[str, ...], tuple[type, ...]]) -> _Layout:
    name, keys, value_types = key
    types = [_TYPE_OF.get(value_type, ColumnType.OTHER) for value_type in value_types]
    shape = _encode_json([name, "".join(types), keys]).encode()
    columns = "".join(_FORMAT_OF[column] for column in types)
    row = struct.Struct(f"{SPAN_FIXED.format}{len(shape)}s{columns}")
    return _Layout(
        row.pack,
        row.size,
        shape,
        tuple(
            (at, column is ColumnType.OTHER)
            for at, column in enumerate(types)
            if column in _HAS_TEXT
        ),
    )


_LAYOUTS: Final[Memo[tuple[str, tuple[str, ...], tuple[type, ...]], _Layout]] = Memo(
    _layout, _NUM_LAYOUTS_REMEMBERED_MAX
)

# The same for rows: nobody asks for their keys again, nor for the types of their numbers.
_ROW_LAYOUTS: Final[Memo[tuple[str, NumberColumns], _Layout]] = Memo(
    lambda key: _layout((key[0], key[1].names, key[1].types)), _NUM_LAYOUTS_REMEMBERED_MAX
)


def pack_span(
    name: str,
    *,
    trace_id: bytes,
    span_id: int,
    parent_span_id: int,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, AttributeValue],
    links: Sequence[tuple[bytes, int]],
    error: str,
) -> bytes:
    """A whole SPAN record. Integers beyond 64 bits become text, which is how spans show them.

    Raises:
        struct.error: if an id or a time is no unsigned number of 64 bits.
        TypeError: if an attribute has a value that JSON does not know.
    """
    values: list[Any]
    if isinstance(attributes, NumberRow):
        values = [*attributes.numbers]
        layout = _ROW_LAYOUTS[name, attributes.columns]
    else:
        values = [*attributes.values()]
        layout = _LAYOUTS[name, tuple(attributes), tuple(map(type, values))]
    texts = []
    for at, is_json in layout.texts:
        text = _encode_json(values[at]) if is_json else values[at]
        # A lone surrogate, which UTF-8 cannot carry, becomes a question mark.
        texts.append(written := text.encode("utf-8", "replace"))
        values[at] = len(written)
    if links:
        texts += [SPAN_LINK.pack(*link) for link in links]
    texts.append(written_error := error.encode("utf-8", "replace"))
    tail = b"".join(texts)
    num_bytes = layout.num_bytes + len(tail)
    padding = _PADDINGS[num_bytes % ALIGNMENT_BYTES]
    try:
        # fmt: off
        head = layout.pack(
            num_bytes + len(padding), _SPAN, trace_id, span_id, parent_span_id, start_ns, end_ns,
            len(layout.shape), len(written_error), len(links), layout.shape, *values,
        )
        # fmt: on
    except struct.error:
        fitting = {key: _fit(value) for key, value in attributes.items()}
        if fitting == attributes:
            raise
        return pack_span(
            name,
            trace_id=trace_id,
            span_id=span_id,
            parent_span_id=parent_span_id,
            start_ns=start_ns,
            end_ns=end_ns,
            attributes=fitting,
            links=links,
            error=error,
        )
    return head + tail + padding


def _fit(value: AttributeValue) -> AttributeValue:
    is_too_large = isinstance(value, int) and not _INT64_MIN <= value <= _INT64_MAX
    return str(value) if is_too_large else value


class SpanShape:
    """What the rows of a shape mean.

    Attributes:
        name: Of the spans.
        columns: Key and type of each attribute.
    """

    def __init__(self, shape: bytes) -> None:
        """Parse it.

        Raises:
            ValueError: if it is damaged.
        """
        try:
            name, types, keys = json.loads(shape)
            self.columns = [
                (str(key), ColumnType(column)) for key, column in zip(keys, types, strict=True)
            ]
        except TypeError as error:
            raise ValueError(f"the shape of a span is damaged: {error}") from error
        self.name = str(name)
        row = struct.Struct("<" + "".join(_FORMAT_OF[column] for _, column in self.columns))
        self._unpack_from = row.unpack_from
        self._num_bytes = row.size
        self._texts = [at for at, (_, column) in enumerate(self.columns) if column in _HAS_TEXT]

    def read(self, records: bytes, at: int) -> tuple[list[Any], int]:
        """The values of the row at ``at``, and where they end; texts are left as bytes.

        Raises:
            struct.error: if ``records`` ends before the row does.
        """
        values = list(self._unpack_from(records, at))
        at += self._num_bytes
        for column in self._texts:
            end = at + values[column]
            values[column] = records[at:end]
            at = end
        return values, at


def unpack_span(record: bytes) -> SpanRecord:
    """Inverse of ``pack_span``; sequences come back as lists.

    Raises:
        ValueError: if its shape or a text is broken, or its parts are longer than it.
        struct.error: if the record is shorter than it says.
    """
    # fmt: off
    (
        length, _kind, trace_id, span_id, parent_span_id, start_ns, end_ns, num_shape_bytes,
        num_error_bytes, num_links,
    ) = SPAN_FIXED.unpack_from(record)
    # fmt: on
    row_start = SPAN_FIXED.size + num_shape_bytes
    shape = SpanShape(record[SPAN_FIXED.size : row_start])
    values, links_start = shape.read(record, row_start)
    error_start, end = span_ends(links_start, num_links, num_error_bytes, length)
    return SpanRecord(
        name=shape.name,
        trace_id=trace_id,
        span_id=span_id,
        parent_span_id=parent_span_id,
        start_ns=start_ns,
        end_ns=end_ns,
        attributes={
            key: _value(column, value)
            for (key, column), value in zip(shape.columns, values, strict=True)
        },
        links=tuple(SPAN_LINK.iter_unpack(record[links_start:error_start])),
        error=record[error_start:end].decode(),
    )


def span_ends(
    links_start: int, num_links: int, num_error_bytes: int, record_end: int
) -> tuple[int, int]:
    """Where links and error of a record end.

    Raises:
        ValueError: if that is behind the record's own end.
    """
    links_end = links_start + num_links * SPAN_LINK.size
    end = links_end + num_error_bytes
    if end > record_end:
        raise ValueError(f"a span of {end - record_end} bytes more than its record")
    return links_end, end


def _value(column: ColumnType, value: Any) -> Any:
    if column is ColumnType.TEXT:
        return value.decode()
    return json.loads(value) if column is ColumnType.OTHER else value
