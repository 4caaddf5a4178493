"""The process beside the services: reads their rings, makes spans, hands them to a destination.

One pass reads what waits in each ring and adds its spans to a batch; a batch that is large or old
enough is delivered, and only then the rings are told that the records may be overwritten. So a
killed exporter loses nothing: the next one reads from the last delivered batch on.
"""

import logging
import os
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from opentelemetry.sdk.trace import ReadableSpan

from pageframe.core.errors import PageframeError
from pageframe.core.trace import TraceMode
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.telemetry.destinations import Destination
from pageframe.telemetry.mapping import SpanMapper
from pageframe.telemetry.records import unpack
from pageframe.telemetry.ring import RingReader

_logger = logging.getLogger(__name__)

# A batch is delivered at the first of these.
_NUM_SPANS_PER_BATCH: Final = 1_000
_RING_BYTES_PER_BATCH: Final = 256 * 1024
_BATCH_AGE_NS_MAX: Final = NANOSECONDS_PER_SECOND // 5
# Bytes read from one ring in one pass, so that no ring waits long for another.
_RING_BYTES_PER_PASS: Final = 64 * 1024

_PAUSE_S_MIN: Final = 0.005
_PAUSE_S_MAX: Final = 0.050
_ATTACH_INTERVAL_NS: Final = NANOSECONDS_PER_SECOND // 4
_REPORT_INTERVAL_NS: Final = NANOSECONDS_PER_SECOND


class RingSource:
    """One ring path over all the rings that are made there, one after the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader: RingReader | None = None
        self._mapper: SpanMapper | None = None
        self._next_attach_ns = 0
        self._next_report_ns = 0
        self._last_problem = ""

    @property
    def is_lossless(self) -> bool:
        """Whether the producer would rather wait than lose a record."""
        return self._reader is not None and self._reader.mode is TraceMode.AUDIT

    @property
    def num_bytes_uncommitted(self) -> int:
        """Bytes of the ring that are read and not given back yet."""
        return 0 if self._reader is None else self._reader.num_bytes_uncommitted

    @property
    def is_ring_crowded(self) -> bool:
        """Whether what is read and not given back takes a quarter of the ring or more."""
        return (
            self._reader is not None
            and 4 * self._reader.num_bytes_uncommitted >= self._reader.capacity_bytes
        )

    def is_finished(self) -> bool:
        """Whether nothing waits and nothing will come, as far as one can see."""
        reader = self._reader
        return reader is None or (reader.is_producer_gone() and not reader.num_bytes_waiting)

    def is_outdated(self) -> bool:
        """Whether the ring is read out and another one lies at its path."""
        reader = self._reader
        return reader is not None and not reader.num_bytes_waiting and reader.is_replaced()

    def attach(self, now_ns: int) -> None:
        """Look for a ring if there is none yet; at most a few times a second."""
        if self._reader is not None or now_ns < self._next_attach_ns:
            return
        self._next_attach_ns = now_ns + _ATTACH_INTERVAL_NS
        if not self._path.exists():
            return
        try:
            reader = RingReader(self._path)
        except (PageframeError, OSError) as error:
            if str(error) != self._last_problem:
                self._last_problem = str(error)
                _logger.warning("cannot read the ring: %s", error)
            return
        self._reader = reader
        self._mapper = SpanMapper(
            service_name=reader.service_name,
            incarnation=reader.incarnation,
            producer_pid=reader.producer.pid,
            num_home_spans=reader.num_home_spans,
        )

    def read(self) -> tuple[int, list[ReadableSpan]]:
        """The next records, how many there were, and their spans."""
        if self._reader is None or self._mapper is None:
            return 0, []
        try:
            records = self._reader.read(_RING_BYTES_PER_PASS)
        except PageframeError as error:
            _logger.error("records are lost: %s", error)
            return 0, []
        spans: list[ReadableSpan] = []
        for record in records:
            try:
                spans += self._mapper.spans(unpack(record))
            except (ValueError, KeyError, TypeError, struct.error):
                _logger.exception("a record of %d bytes is not understood", len(record))
        return len(records), spans

    def drop_report(self, now_ns: int, *, is_last: bool = False) -> list[ReadableSpan]:
        """Spans that tell of records newly dropped by the producer; at most once a second."""
        reader, mapper = self._reader, self._mapper
        if reader is None or mapper is None or (now_ns < self._next_report_ns and not is_last):
            return []
        num_dropped_total = reader.num_dropped
        num_dropped = num_dropped_total - reader.num_dropped_reported
        if not num_dropped:
            return []
        self._next_report_ns = now_ns + _REPORT_INTERVAL_NS
        reader.num_dropped_reported = num_dropped_total
        _logger.warning(
            "%s dropped %d records, %d so far", reader.service_name, num_dropped, num_dropped_total
        )
        return mapper.drop_spans(
            time_ns=now_ns,
            num_dropped=num_dropped,
            num_dropped_total=num_dropped_total,
            dropped_by="ring",
        )

    def loss_report(self, now_ns: int, num_dropped: int, total: int) -> list[ReadableSpan]:
        """Spans that tell of spans lost behind the ring; empty when no ring is attached."""
        if self._mapper is None:
            return []
        return self._mapper.drop_spans(
            time_ns=now_ns, num_dropped=num_dropped, num_dropped_total=total, dropped_by="exporter"
        )

    def commit(self) -> None:
        """Give the producer back what was read."""
        if self._reader is not None and self._mapper is not None:
            self._reader.num_home_spans = self._mapper.home.num_spans
            self._reader.commit()

    def detach(self) -> None:
        """Let go of the ring, and remove it when its producer is gone and it is read out."""
        if self._reader is None:
            return
        reader, self._reader, self._mapper = self._reader, None, None
        is_used_up = reader.is_producer_gone() and not (
            reader.num_bytes_waiting or reader.num_bytes_uncommitted
        )
        if is_used_up and not reader.is_replaced():
            reader.path.unlink(missing_ok=True)
        reader.close()


class Exporter:
    """Moves records from rings to a destination, pass by pass."""

    def __init__(
        self,
        ring_paths: Sequence[Path],
        destination: Destination,
        *,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._sources = [RingSource(path) for path in ring_paths]
        self._destination = destination
        self._now_ns = now_ns
        self._batch: list[ReadableSpan] = []
        self._batch_since_ns = 0
        self._num_lost_reported = 0

    def run(self, is_stopping: Callable[[], bool]) -> None:
        """Pass after pass until ``is_stopping``; pauses grow while nothing happens."""
        pause_s = _PAUSE_S_MIN
        while not is_stopping():
            if self.run_pass():
                pause_s = _PAUSE_S_MIN
            else:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_S_MAX)

    def run_pass(self) -> int:
        """One look at every ring; how many records were read."""
        now_ns = self._now_ns()
        num_records = 0
        for source in self._sources:
            source.attach(now_ns)
            if source.is_lossless and not self._destination.has_room():
                continue  # The ring fills up and its producer waits: that is what it asked for.
            num_read, spans = source.read()
            num_records += num_read
            self._add(spans + source.drop_report(now_ns), now_ns)
        if self._is_due(now_ns):
            self.flush()
        if not num_records:
            self._replace_outdated()
        return num_records

    def flush(self) -> None:
        """Deliver the batch, then give the ring memory back."""
        if self._batch:
            try:
                self._destination.deliver(self._batch)
            except Exception:
                # The last resort of a process that must outlive a bad span: say it, go on.
                _logger.exception("a batch of %d spans is lost", len(self._batch))
            self._batch = []
        for source in self._sources:
            source.commit()
        self._report_losses()

    def drain(self, timeout_s: float, *, until_finished: bool) -> None:
        """Read what is left, for at most ``timeout_s``, then close everything.

        Args:
            timeout_s: Bound for reading and delivering together.
            until_finished: Wait for producers that still live, since nobody else does; else one
                pass that finds nothing is the end.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.run_pass():
                continue
            if not until_finished or all(source.is_finished() for source in self._sources):
                break
            time.sleep(_PAUSE_S_MIN)
        now_ns = self._now_ns()
        for source in self._sources:
            self._add(source.drop_report(now_ns, is_last=True), now_ns)
        self.flush()
        for source in self._sources:
            source.detach()
        self._destination.close(max(0.0, deadline_s - time.monotonic()))

    def _add(self, spans: list[ReadableSpan], now_ns: int) -> None:
        if spans and not self._batch:
            self._batch_since_ns = now_ns
        self._batch += spans

    def _is_due(self, now_ns: int) -> bool:
        num_bytes = sum(source.num_bytes_uncommitted for source in self._sources)
        return (
            len(self._batch) >= _NUM_SPANS_PER_BATCH
            or num_bytes >= _RING_BYTES_PER_BATCH
            or any(source.is_ring_crowded for source in self._sources)
            or (num_bytes > 0 and not self._batch)
            or (bool(self._batch) and now_ns - self._batch_since_ns >= _BATCH_AGE_NS_MAX)
        )

    def _replace_outdated(self) -> None:
        for source in self._sources:
            if source.is_outdated():
                self.flush()
                source.detach()

    def _report_losses(self) -> None:
        total = self._destination.num_spans_dropped
        num_dropped = total - self._num_lost_reported
        if not num_dropped or not self._destination.has_room():
            return
        now_ns = self._now_ns()
        for source in self._sources:
            spans = source.loss_report(now_ns, num_dropped, total)
            if spans:
                self._num_lost_reported = total
                _logger.warning(
                    "%d spans were lost behind the rings, %d so far", num_dropped, total
                )
                self._add(spans, now_ns)
                return


def lower_priority() -> None:
    """Let every service go first: spans can wait, steps cannot."""
    os.nice(10)
