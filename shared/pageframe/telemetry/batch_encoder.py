"""From a batch of records to the requests that carry their spans."""

import logging
import struct
from collections.abc import Iterator, Sequence
from typing import Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from pageframe.telemetry.kv_encoder import KvEncoder
from pageframe.telemetry.mapping import SpanMapper
from pageframe.telemetry.memo import Memo
from pageframe.telemetry.record_batch import Producer, RecordBatch
from pageframe.telemetry.ring import RecordKind
from pageframe.telemetry.span_encoder import SpanEncoder
from pageframe.telemetry.span_form import SpanForm

_logger = logging.getLogger(__name__)

# Half of what a gRPC server takes by default.
REQUEST_BYTES_MAX: Final = 2 * 1024 * 1024
_NUM_PRODUCERS_REMEMBERED_MAX: Final = 16
_KV: Final = int(RecordKind.KV)
_SPAN: Final = int(RecordKind.SPAN)


class BatchEncoder:
    """Encodes batches of any number of producers in one form.

    Attributes:
        num_spans_failed: Records that were not understood, and spans that could not be encoded.
    """

    def __init__(self, form: SpanForm, request_bytes_max: int = REQUEST_BYTES_MAX) -> None:
        self.num_spans_failed = 0
        self._form = form
        self._request_bytes_max = request_bytes_max
        self._spans = SpanEncoder(form)
        self._encoders: Memo[Producer, tuple[SpanMapper, KvEncoder]] = Memo(
            self._new_encoders, _NUM_PRODUCERS_REMEMBERED_MAX
        )

    def requests(self, batch: RecordBatch) -> list[tuple[bytes, int]]:
        """Encoded requests and how many spans each holds.

        Each is under the bound, unless a single span is not. What cannot be encoded is counted,
        logged and left out.
        """
        mapper, encoder = self._encoders[batch.producer]
        made: list[ReadableSpan] = []
        for loss in batch.losses:
            made += mapper.loss_spans(loss, batch.time_ns)
        entries: list[bytes] = []
        num_seen = 0
        try:
            for start, end, kind in batch.each_record():
                num_seen += 1
                try:
                    if kind == _KV:
                        entries.append(encoder.encode(batch.records, start, made))
                    elif kind == _SPAN:
                        entries.append(self._spans.encode(batch.records, start))
                    else:
                        raise ValueError(f"a record of kind {kind}")
                except (ValueError, KeyError, TypeError, struct.error):
                    self.num_spans_failed += 1
                    _logger.exception("a record of %d bytes is not understood", end - start)
        except ValueError as error:
            self.num_spans_failed += max(0, batch.num_records - num_seen)
            _logger.error("the rest of a batch is lost: %s", error)
        entries += self._encode(made)
        return list(
            split_into_requests(self._form, mapper.resource, entries, self._request_bytes_max)
        )

    def _encode(self, spans: Sequence[ReadableSpan]) -> list[bytes]:
        if not spans:
            return []
        try:
            return self._form.spans(spans)
        except Exception:
            # The last resort of a process that must outlive bad spans: say it, go on.
            self.num_spans_failed += len(spans)
            _logger.exception("%d spans cannot be encoded", len(spans))
            return []

    def _new_encoders(self, producer: Producer) -> tuple[SpanMapper, KvEncoder]:
        mapper = SpanMapper(producer)
        return mapper, KvEncoder(self._form, mapper)


def split_into_requests(
    form: SpanForm, resource: Resource, entries: Sequence[bytes], num_bytes_max: int
) -> Iterator[tuple[bytes, int]]:
    """Requests, each under ``num_bytes_max``, and how many spans each holds.

    Too many spans are halved, down to a single one, which goes as it is.
    """
    if not entries:
        return
    request = form.request(resource, entries)
    if len(request) < num_bytes_max or len(entries) == 1:
        yield request, len(entries)
        return
    middle = len(entries) // 2
    for half in (entries[:middle], entries[middle:]):
        yield from split_into_requests(form, resource, half, num_bytes_max)
