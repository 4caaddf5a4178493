"""Where records go: through a spool to a collector or to files, or nowhere."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

from pageframe.telemetry.record_batch import RecordBatch
from pageframe.telemetry.sender import RequestClient, Sender
from pageframe.telemetry.spool import SPOOL_BYTES_DEFAULT, Spool
from pageframe.telemetry.trace_files import NUM_FILES_MAX_DEFAULT, TraceFiles

_logger = logging.getLogger(__name__)

_ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOL_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_NUM_FILES_MAX_LOSSLESS: Final = 1_000_000


class Destination(Protocol):
    """Takes batches; what it has taken is safe from the end of this process."""

    @property
    def num_dropped(self) -> int:
        """Records and spans lost after they had been read from a ring."""
        ...

    def has_room(self, num_bytes: int) -> bool:
        """Whether a batch of this size would be taken."""
        ...

    def deliver(self, batch: RecordBatch) -> bool:
        """Take a batch; one that cannot be taken is counted as dropped."""
        ...

    def close(self, timeout_s: float) -> None:
        """Finish within ``timeout_s``."""
        ...


class NowhereDestination:
    """Takes everything and keeps nothing; for a disabled SDK, so that rings still drain."""

    num_dropped = 0

    def has_room(self, num_bytes: int) -> bool:
        """Always."""
        return True

    def deliver(self, batch: RecordBatch) -> bool:
        """Forget it, as asked: that does not count as dropped."""
        return True

    def close(self, timeout_s: float) -> None:
        """Do nothing."""


class SpooledDestination:
    """A collector, or files, behind a spool; see ``spool`` and ``sender``."""

    def __init__(
        self,
        folder: Path,
        client: RequestClient,
        *,
        spool_bytes_max: int = SPOOL_BYTES_DEFAULT,
    ) -> None:
        """The spool lies in ``folder``.

        Raises:
            OSError: if the folder cannot be made.
        """
        self._spool = Spool(folder, spool_bytes_max)
        self._sender = Sender(self._spool, client)
        self._num_unspooled = 0

    @property
    def num_dropped(self) -> int:
        """What the full spool or the collector refused, or could not be encoded."""
        return self._num_unspooled + self._sender.num_spans_dropped

    def has_room(self, num_bytes: int) -> bool:
        """Whether a batch of this size would be taken."""
        return self._spool.has_room(num_bytes)

    def deliver(self, batch: RecordBatch) -> bool:
        """Put a batch into the spool."""
        is_taken = self._spool.put(batch.pack(), batch.num_records)
        if not is_taken:
            self._num_unspooled += batch.num_records
        return is_taken

    def close(self, timeout_s: float) -> None:
        """Send what waits; the rest stays in the spool for the next start."""
        self._sender.close(timeout_s)


def choose_destination(
    state_dir: Path,
    stem: str,
    *,
    is_lossless: bool = False,
    spool_bytes_max: int = SPOOL_BYTES_DEFAULT,
    environment: Mapping[str, str] = os.environ,
) -> Destination:
    """What the standard ``OTEL_*`` variables ask for.

    Args:
        state_dir: Files go to its ``traces`` folder, the spool is its ``spool`` folder.
        stem: Name of the trace file, without its ending.
        is_lossless: Keep old trace files for ever.
        spool_bytes_max: Bound of what waits on disk.
        environment: Where the variables are looked up.

    Raises:
        OSError: if a folder cannot be made.
    """
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    is_disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_disabled or exporter == "none":
        return NowhereDestination()
    client: RequestClient | None = None
    if any(environment.get(name, "").strip() for name in _ENDPOINT_VARIABLES):
        protocol = next(filter(None, map(environment.get, _PROTOCOL_VARIABLES)), "grpc")
        if protocol == "grpc":
            # Imported late: gRPC and OpenTelemetry's exporter are of use for a collector alone.
            from pageframe.telemetry.client import OtlpClient

            client = OtlpClient()
        else:
            _logger.error(
                "traces are sent by OTLP over grpc only, not %s; they go to %s instead",
                protocol,
                state_dir / "traces",
            )
    if client is None:
        num_files_max = _NUM_FILES_MAX_LOSSLESS if is_lossless else NUM_FILES_MAX_DEFAULT
        client = TraceFiles(state_dir / "traces", stem, num_files_max=num_files_max)
    return SpooledDestination(state_dir / "spool", client, spool_bytes_max=spool_bytes_max)
