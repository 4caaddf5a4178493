"""From a packed span record straight to an encoded span, without an object in between.

``mapping`` and OpenTelemetry's classes say what a span must be; this is the same ten times faster.
A record brings its shape along, and spans of a shape are written alike::

    shape ─once─▶ name, what writes each column
    record ─unpack─▶ ids, times, values ─▶ one part each ─▶ join
"""

from typing import Final

from pageframe.telemetry import spans as names
from pageframe.telemetry.mapping import clean_value
from pageframe.telemetry.memo import Memo
from pageframe.telemetry.span_form import SpanForm
from pageframe.telemetry.span_records import SPAN_FIXED, SPAN_LINK, SpanShape, span_ends

_NUM_SHAPES_REMEMBERED_MAX: Final = 1024
_FIXED_BYTES: Final = SPAN_FIXED.size


class _ShapeWriter:
    """How spans of a shape are written: their name, and each of their columns."""

    __slots__ = ("columns", "name", "read")

    def __init__(self, form: SpanForm, packed: bytes) -> None:
        shape = SpanShape(packed)
        self.read = shape.read
        self.name = form.name(clean_value(shape.name), is_server=shape.name in names.SERVER_SPANS)
        self.columns = form.columns([(clean_value(key), column) for key, column in shape.columns])


class SpanEncoder:
    """Encodes span records of any number of rings."""

    def __init__(self, form: SpanForm) -> None:
        self._form = form
        self._shapes: Memo[bytes, _ShapeWriter] = Memo(
            lambda packed: _ShapeWriter(form, packed), _NUM_SHAPES_REMEMBERED_MAX
        )

    def encode(self, records: bytes, at: int) -> bytes:
        """The span of a span record, as an entry of a request.

        Args:
            records: Any number of records.
            at: Where this one begins.

        Raises:
            ValueError: if its shape or a text is broken, or its parts are longer than it.
            TypeError: if a value is none that an attribute may have.
            struct.error: if ``records`` ends before the record does.
        """
        # fmt: off
        (
            length, _kind, trace_id, span_id, parent_span_id, start_ns, end_ns, num_shape_bytes,
            num_error_bytes, num_links,
        ) = SPAN_FIXED.unpack_from(records, at)
        # fmt: on
        shape_start = at + _FIXED_BYTES
        row_start = shape_start + num_shape_bytes
        shape = self._shapes[records[shape_start:row_start]]
        values, links_start = shape.read(records, row_start)
        error_start, end = span_ends(links_start, num_links, num_error_bytes, at + length)
        form = self._form
        parts = [
            form.trace(trace_id),
            form.span_id(span_id),
            form.parent(parent_span_id),
            shape.name,
            form.interval(start_ns, end_ns),
        ]
        parts += [write(value) for write, value in zip(shape.columns, values, strict=True)]
        links = [*SPAN_LINK.iter_unpack(records[links_start:error_start])] if num_links else ()
        return form.finished_span(parts, links, records[error_start:end])
