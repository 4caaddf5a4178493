"""The process beside the services: empties their rings into a destination.

A ring is emptied when enough waits in it. When something has waited for a while in one, all are
emptied: one batch a second costs the processor less than ten small ones, and rings that are
emptied together are due together. Only when the destination has taken the records, the ring is told
that they may be overwritten. So a killed exporter loses nothing: the next one reads from the last
batch on.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from pageframe.config.cores import give_way
from pageframe.core.errors import PageframeError
from pageframe.core.trace import TraceMode
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.telemetry.destinations import Destination
from pageframe.telemetry.record_batch import Loss, Producer, RecordBatch
from pageframe.telemetry.ring import RingReader

_logger = logging.getLogger(__name__)

# A ring is emptied when so much waits, or a quarter of what it holds.
_RING_BYTES_DUE: Final = 256 * 1024
# All rings are emptied when something has waited for so long.
_WAIT_NS_MAX: Final = NANOSECONDS_PER_SECOND
# Bytes taken at once: no ring waits long for another, and the spans fit into one request.
_BATCH_BYTES_MAX: Final = 512 * 1024
# Room that must be in the destination before records of a lossless ring are taken.
_ROOM_BYTES_MIN: Final = 8 * 1024 * 1024

# To wake up costs more than to look. A ring of the usual size takes seconds to fill up.
_PAUSE_S: Final = 0.1
_DRAIN_PAUSE_S: Final = 0.005
_ATTACH_INTERVAL_NS: Final = NANOSECONDS_PER_SECOND // 4
_LOOK_INTERVAL_NS: Final = NANOSECONDS_PER_SECOND
_REPORT_INTERVAL_NS: Final = NANOSECONDS_PER_SECOND


class RingSource:
    """One ring path over all the rings that are made there, one after the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader: RingReader | None = None
        self._producer = Producer("", 1, 0)
        self._waiting_since_ns = 0
        self._next_attach_ns = 0
        self._next_look_ns = 0
        self._next_report_ns = 0
        self._last_problem = ""

    @property
    def is_lossless(self) -> bool:
        """Whether the producer would rather wait than lose a record."""
        return self._reader is not None and self._reader.mode is TraceMode.AUDIT

    def is_finished(self) -> bool:
        """Whether nothing waits and nothing will come, as far as one can see."""
        reader = self._reader
        return reader is None or (reader.is_producer_gone() and not reader.num_bytes_waiting)

    def is_outdated(self, now_ns: int) -> bool:
        """Whether the ring is read out and another one lies at its path; looks now and then."""
        reader = self._reader
        if reader is None or reader.num_bytes_waiting or now_ns < self._next_look_ns:
            return False
        self._next_look_ns = now_ns + _LOOK_INTERVAL_NS
        return reader.is_replaced()

    def waited_ns(self, now_ns: int) -> int:
        """For how long something has been seen to wait in the ring; 0 when nothing waits."""
        if self._reader is None or not self._reader.num_bytes_waiting:
            self._waiting_since_ns = 0
            return 0
        self._waiting_since_ns = self._waiting_since_ns or now_ns
        return now_ns - self._waiting_since_ns

    def is_due(self, now_ns: int, *, is_time: bool) -> bool:
        """Whether the ring is to be emptied, or drops are to be told.

        ``is_time`` empties it whatever waits.
        """
        reader = self._reader
        if reader is None:
            return False
        num_bytes = reader.num_bytes_waiting
        if not num_bytes:
            has_news = reader.num_dropped > reader.num_dropped_reported
            return has_news and now_ns >= self._next_report_ns
        return is_time or num_bytes >= min(_RING_BYTES_DUE, reader.capacity_bytes // 4)

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
        self._producer = Producer(reader.service_name, reader.incarnation, reader.producer.pid)

    def read(
        self, now_ns: int, losses: Sequence[Loss], *, is_last: bool = False
    ) -> RecordBatch | None:
        """The next records, with what was lost before them; None when there is nothing to say.

        ``commit`` must follow, and ``confirm`` if the batch was delivered. ``is_last`` tells of all
        drops, however lately others were told.
        """
        if self._reader is None:
            return None
        try:
            records, num_records = self._reader.read(_BATCH_BYTES_MAX)
        except PageframeError as error:
            _logger.error("records are lost: %s", error)
            return None
        self._waiting_since_ns = 0
        num_dropped_total = self._reader.num_dropped
        num_dropped = num_dropped_total - self._reader.num_dropped_reported
        if num_dropped and (is_last or now_ns >= self._next_report_ns):
            losses = [*losses, Loss("ring", num_dropped, num_dropped_total)]
        if not num_records and not losses:
            return None
        return RecordBatch(self._producer, now_ns, num_records, tuple(losses), records)

    def confirm(self, batch: RecordBatch) -> None:
        """Take note that what the batch tells has been told."""
        assert self._reader is not None, "a batch of no ring"
        for loss in batch.losses:
            _logger.warning(
                "%d records of %s were lost by the %s, %d so far",
                loss.num_lost,
                batch.producer.service_name,
                loss.lost_by,
                loss.num_lost_total,
            )
            if loss.lost_by == "ring":
                self._reader.num_dropped_reported = loss.num_lost_total
                self._next_report_ns = batch.time_ns + _REPORT_INTERVAL_NS

    def commit(self) -> None:
        """Give the producer back what was read."""
        if self._reader is not None:
            self._reader.commit()

    def detach(self) -> None:
        """Let go of the ring, and remove it when its producer is gone and it is read out."""
        if self._reader is None:
            return
        reader, self._reader = self._reader, None
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
        self._num_lost_reported = 0

    def run(self, wait: Callable[[float], bool]) -> None:
        """Pass after pass, with a pause after each that moved nothing.

        Args:
            wait: Waits for at most so many seconds; whether that is the end.
        """
        pause_s = 0.0
        while not wait(pause_s):
            pause_s = 0.0 if self.run_pass() else _PAUSE_S

    def run_pass(self, *, is_draining: bool = False) -> int:
        """One look at every ring; how many records were moved.

        ``is_draining`` moves what waits, however little and however short.
        """
        now_ns = self._now_ns()
        num_records = 0
        for source in self._sources:
            source.attach(now_ns)
        longest_ns = max((source.waited_ns(now_ns) for source in self._sources), default=0)
        is_time = longest_ns >= _WAIT_NS_MAX
        for source in self._sources:
            if source.is_lossless and not self._destination.has_room(_ROOM_BYTES_MIN):
                continue  # The ring fills up and its producer waits: that is what it asked for.
            if is_draining or source.is_due(now_ns, is_time=is_time):
                num_records += self._move(source, now_ns, is_last=is_draining)
        if not num_records:
            for source in self._sources:
                if source.is_outdated(now_ns):
                    source.detach()
        return num_records

    def drain(self, timeout_s: float, *, until_finished: bool) -> None:
        """Read what is left, for at most ``timeout_s``, then close everything.

        Args:
            timeout_s: Bound for reading and delivering together.
            until_finished: Wait for producers that still live, since nobody else does; else one
                pass that finds nothing is the end.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.run_pass(is_draining=True):
                continue
            if not until_finished or all(source.is_finished() for source in self._sources):
                break
            time.sleep(_DRAIN_PAUSE_S)
        for source in self._sources:
            source.detach()
        self._destination.close(max(0.0, deadline_s - time.monotonic()))

    def _move(self, source: RingSource, now_ns: int, *, is_last: bool) -> int:
        """Deliver the next batch of a ring, then give the ring memory back."""
        num_lost_total = self._destination.num_dropped
        num_lost = num_lost_total - self._num_lost_reported
        losses = [Loss("exporter", num_lost, num_lost_total)] if num_lost else []
        batch = source.read(now_ns, losses, is_last=is_last)
        if batch is not None and self._destination.deliver(batch):
            source.confirm(batch)
            self._num_lost_reported = num_lost_total
        source.commit()
        return 0 if batch is None else batch.num_records


def lower_priority() -> None:
    """Let every service go first: spans can wait, steps cannot."""
    give_way()
    os.nice(10)
