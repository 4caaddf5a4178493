"""The thread that empties the spool into the collector, in order, until it is told to stop."""

import logging
import threading
from typing import Final, Protocol

from pageframe.telemetry.spool import Spool, SpoolEntry

_logger = logging.getLogger(__name__)

_BACKOFF_S_MIN: Final = 0.1
_BACKOFF_S_MAX: Final = 5.0
_IDLE_S: Final = 1.0
# A request that fails so often while the collector answers others will never be taken.
_NUM_REFUSALS_MAX: Final = 8


class RequestClient(Protocol):
    """What the sender needs of an OTLP client."""

    def send(self, request: bytes) -> bool:
        """Whether the collector took the request; ValueError when it is malformed."""
        ...

    def is_reachable(self) -> bool:
        """Whether the collector takes an empty request."""
        ...

    def close(self) -> None:
        """Cancel what is in flight."""
        ...


class Sender:
    """Sends what is in a spool, retrying with growing pauses while the collector is away.

    Attributes:
        num_spans_dropped: Spans that the collector refused for good.
    """

    def __init__(self, spool: Spool, client: RequestClient) -> None:
        self.num_spans_dropped = 0
        self._spool = spool
        self._client = client
        self._closing = threading.Event()
        self._num_refusals = 0
        self._is_away = False
        self._thread = threading.Thread(target=self._run, name="otlp-sender", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Send what waits while the collector takes it, for at most ``timeout_s``.

        What is left stays in the spool.
        """
        self._closing.set()
        self._spool.wake()
        self._thread.join(timeout_s)
        self._client.close()
        if len(self._spool):
            _logger.warning("%d spans stay in the spool for later", self._spool.num_spans)

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
        """Make one attempt; whether the entry is done with, sent or not."""
        try:
            is_sent = self._client.send(entry.path.read_bytes())
        except FileNotFoundError:
            is_sent = True  # Another exporter on the same state folder was faster.
        except ValueError:
            self._drop(entry, "it is malformed")
            return True
        if is_sent:
            self._spool.remove(entry)
            self._num_refusals = 0
            if self._is_away:
                self._is_away = False
                _logger.info("the collector is back")
            return True
        if not self._client.is_reachable():
            if not self._is_away:
                self._is_away = True
                _logger.warning("the collector is away; spans wait in the spool")
            return False
        self._num_refusals += 1
        if self._num_refusals < _NUM_REFUSALS_MAX:
            return False
        self._drop(entry, "the collector refuses it")
        return True

    def _drop(self, entry: SpoolEntry, reason: str) -> None:
        _logger.error("a request of %d spans is dropped: %s", entry.num_spans, reason)
        self.num_spans_dropped += entry.num_spans
        self._num_refusals = 0
        self._spool.remove(entry)
