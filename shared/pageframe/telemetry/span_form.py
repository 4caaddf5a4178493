"""How spans are written: what the protobuf and the JSON form of OTLP have in common.

A span is a row of parts, and nearly all of them are seen again and again: the trace of a sequence,
a block id, a step. So each part is made once and remembered as bytes, and a span is a join::

    trace │ span id │ parent │ name │ times │ kv.operation │ other attributes … │ link │ end

The forms know how a part is written; ``kv_encoder`` knows which parts an operation has, and
``span_encoder`` which a finished span has.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from pageframe.telemetry.mapping import clean_value
from pageframe.telemetry.memo import Memo
from pageframe.telemetry.span_records import ColumnType

# Values of one attribute that are remembered; longer ones are hardly ever the same twice.
_NUM_TEXTS_REMEMBERED_MAX: Final = 1024
_TEXT_BYTES_REMEMBERED_MAX: Final = 64


def column_writer(column: ColumnType, write: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """What writes an attribute from a value as ``SpanShape.read`` has it.

    Args:
        column: Its type.
        write: Writes the attribute from the value itself; numbers, which are often new, go to it as
            they are, so a form that has a faster way for them takes that instead.
    """

    def write_text(raw: bytes) -> bytes:
        return texts[raw] if len(raw) <= _TEXT_BYTES_REMEMBERED_MAX else write(raw.decode())

    match column:
        case ColumnType.INTEGER | ColumnType.NUMBER:
            return write
        case ColumnType.FLAG:
            return (write(False), write(True)).__getitem__
        case ColumnType.TEXT:
            texts: Memo[bytes, bytes] = Memo(
                lambda raw: write(raw.decode()), _NUM_TEXTS_REMEMBERED_MAX
            )
            return write_text
        case ColumnType.OTHER:
            return lambda raw: write(clean_value(json.loads(raw)))


class SpanForm(Protocol):
    """Writes parts of spans, whole spans, and export requests.

    Parts must be joined in the order of the methods here; ``attribute`` and what ``id_list`` gives
    may repeat. Integers are in ``[0, 2**63)`` unless another range is given.
    """

    def trace(self, trace_id: bytes) -> bytes:
        """The beginning of a span; ``trace_id`` has 16 bytes."""
        ...

    def span_id(self, span_id: int) -> bytes:
        """The span's own id, in ``[1, 2**64)``."""
        ...

    def parent(self, span_id: int) -> bytes:
        """The parent's id, in ``[0, 2**64)``; 0 for none."""
        ...

    def name(self, name: str, *, is_server: bool = False) -> bytes:
        """The name of an internal span, or of one that answers a call from outside."""
        ...

    def instant(self, time_ns: int) -> bytes:
        """Start and end, the same; nanoseconds since the Unix epoch, in ``[1, 2**64)``."""
        ...

    def interval(self, start_ns: int, end_ns: int) -> bytes:
        """Start and end; nanoseconds since the Unix epoch, in ``[0, 2**64)``."""
        ...

    def first_attribute(self, number: int) -> bytes:
        """``kv.operation``, which every operation has; in ``[0, 2**64)``."""
        ...

    def attribute(self, key: str, value: int | str) -> bytes:
        """One more attribute."""
        ...

    def columns(
        self, columns: Sequence[tuple[str, ColumnType]]
    ) -> Sequence[Callable[[Any], bytes]]:
        """What writes each of all attributes of a span, from values as ``SpanShape.read`` has them.

        Args:
            columns: Key and type of each.
        """
        ...

    def id_list(self, key: str) -> Callable[[Sequence[int]], bytes]:
        """What writes an attribute whose value is an array of block ids."""
        ...

    def link(self, trace_id: bytes, span_id: int) -> bytes:
        """The only link of a span; ``trace_id`` has 16 bytes."""
        ...

    def span(self, parts: Iterable[bytes], link: bytes = b"") -> bytes:
        """A whole span from all its parts but the end: an entry of a request."""
        ...

    def finished_span(
        self, parts: Iterable[bytes], links: Sequence[tuple[bytes, int]], error: bytes
    ) -> bytes:
        """A whole span from all its parts up to those of ``columns``: an entry of a request.

        Args:
            parts: As said above.
            links: Trace ids of 16 bytes, and span ids.
            error: In UTF-8; sets the error status, unless it is empty.
        """
        ...

    def spans(self, spans: Sequence[ReadableSpan]) -> list[bytes]:
        """An entry for each finished span, written by OpenTelemetry's own encoder."""
        ...

    def request(self, resource: Resource, entries: Sequence[bytes]) -> bytes:
        """A whole ``ExportTraceServiceRequest`` of one process's spans."""
        ...
