"""The thread that empties the spool, in order: encodes a batch, sends it, removes it."""

import collections
import logging
import threading
from typing import Final, Protocol

from pageframe.telemetry.batch_encoder import BatchEncoder
from pageframe.telemetry.record_batch import RecordBatch
from pageframe.telemetry.span_form import SpanForm
from pageframe.telemetry.spool import Spool, SpoolEntry

_logger = logging.getLogger(__name__)

_BACKOFF_S_MIN: Final = 0.1
_BACKOFF_S_MAX: Final = 5.0
_IDLE_S: Final = 1.0
# A request that fails so often while the collector answers others will never be taken.
_NUM_REFUSALS_MAX: Final = 8


class RequestClient(Protocol):
    """Takes encoded requests: a collector, or files."""

    @property
    def form(self) -> SpanForm:
        """How requests are encoded."""
        ...

    def send(self, request: bytes) -> bool:
        """Whether the request was taken."""
        ...

    def is_reachable(self) -> bool:
        """Whether a request without spans would be taken."""
        ...

    def close(self) -> None:
        """Cancel what is in flight."""
        ...


class Sender:
    """Sends what is in a spool, retrying with growing pauses while the collector is away."""

    def __init__(self, spool: Spool, client: RequestClient) -> None:
        self._spool = spool
        self._client = client
        self._encoder = BatchEncoder(client.form)
        self._closing = threading.Event()
        # Requests of the oldest entry that are still to be sent, each with its number of spans.
        self._entry: SpoolEntry | None = None
        self._requests: collections.deque[tuple[bytes, int]] = collections.deque()
        self._num_refusals = 0
        self._num_spans_refused = 0
        self._num_records_unread = 0
        self._is_away = False
        self._thread = threading.Thread(target=self._run, name="trace-sender", daemon=True)
        self._thread.start()

    @property
    def num_spans_dropped(self) -> int:
        """Spans that could not be encoded, or that the collector refused for good."""
        return self._num_spans_refused + self._num_records_unread + self._encoder.num_spans_failed

    def close(self, timeout_s: float) -> None:
        """Send what waits while the collector takes it, for at most ``timeout_s``.

        What is left stays in the spool.
        """
        self._closing.set()
        self._spool.wake()
        self._thread.join(timeout_s)
        self._client.close()
        if len(self._spool):
            _logger.warning("%d records stay in the spool for later", self._spool.num_records)

    def _run(self) -> None:
        backoff_s = _BACKOFF_S_MIN
        while True:
            entry = self._spool.oldest(0.0 if self._closing.is_set() else _IDLE_S)
            if entry is None:
                if self._closing.is_set():
                    return
                continue
            was_closing = self._closing.is_set()
            if self._try(entry):
                backoff_s = _BACKOFF_S_MIN
                continue
            if was_closing:
                return
            self._closing.wait(backoff_s)
            backoff_s = min(2 * backoff_s, _BACKOFF_S_MAX)

    def _try(self, entry: SpoolEntry) -> bool:
        """Send the entry as far as it goes; whether it is done with, sent or not."""
        if entry is not self._entry:
            self._entry = entry
            self._requests.extend(self._encode(entry))
        while self._requests:
            if not self._try_request(*self._requests[0]):
                return False
            self._requests.popleft()
        self._spool.remove(entry)
        return True

    def _encode(self, entry: SpoolEntry) -> list[tuple[bytes, int]]:
        try:
            return self._encoder.requests(RecordBatch.unpack(entry.path.read_bytes()))
        except FileNotFoundError:
            return []  # Another exporter on the same state folder was faster.
        except (OSError, ValueError) as error:
            self._num_records_unread += entry.num_records
            _logger.error("a batch of %d records is dropped: %s", entry.num_records, error)
            return []

    def _try_request(self, request: bytes, num_spans: int) -> bool:
        """Make one attempt; whether the request is done with, sent or not."""
        if self._client.send(request):
            self._num_refusals = 0
            if self._is_away:
                self._is_away = False
                _logger.info("the collector is back")
            return True
        if not self._client.is_reachable():
            if not self._is_away:
                self._is_away = True
                _logger.warning("the collector is away; records wait in the spool")
            return False
        self._num_refusals += 1
        if self._num_refusals < _NUM_REFUSALS_MAX:
            return False
        self._num_refusals = 0
        self._num_spans_refused += num_spans
        _logger.error("a request of %d spans is dropped: it is refused", num_spans)
        return True
