"""Where spans go: a collector, a file, or nowhere."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from opentelemetry.exporter.otlp.json.file import FileSpanExporter
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

from pageframe.telemetry.client import OtlpClient
from pageframe.telemetry.sender import RequestClient, Sender
from pageframe.telemetry.spool import SPOOL_BYTES_DEFAULT, Spool

_logger = logging.getLogger(__name__)

# Half of what a gRPC server takes by default.
REQUEST_BYTES_MAX: Final = 2 * 1024 * 1024
FILE_BYTES_MAX_DEFAULT: Final = 128 * 1024 * 1024
NUM_FILES_MAX_DEFAULT: Final = 8
_ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOL_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class Destination(Protocol):
    """Takes spans; what it has taken is safe from the end of this process."""

    @property
    def num_spans_dropped(self) -> int:
        """Spans lost after they had been read from a ring."""
        ...

    def has_room(self) -> bool:
        """Whether the next batch would be taken."""
        ...

    def deliver(self, spans: Sequence[ReadableSpan]) -> None:
        """Take a batch; what cannot be taken is counted as dropped."""
        ...

    def close(self, timeout_s: float) -> None:
        """Finish within ``timeout_s``."""
        ...


class NowhereDestination:
    """Takes everything and keeps nothing; for a disabled SDK, so that rings still drain."""

    num_spans_dropped = 0

    def has_room(self) -> bool:
        """Always."""
        return True

    def deliver(self, spans: Sequence[ReadableSpan]) -> None:
        """Forget them, as asked: they do not count as dropped."""

    def close(self, timeout_s: float) -> None:
        """Do nothing."""


class JsonLinesDestination:
    """OTLP JSON lines in a folder, the newest in ``<stem>.jsonl``; Jaeger's UI opens them.

    A full file is put aside as ``<stem>.<time>.jsonl``, and of those only the newest are kept.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        *,
        file_bytes_max: int = FILE_BYTES_MAX_DEFAULT,
        num_files_max: int = NUM_FILES_MAX_DEFAULT,
    ) -> None:
        """Go on with the file that is there.

        Raises:
            OSError: if the folder or the file cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.num_spans_dropped = 0
        self._stem = stem
        self._path = folder / f"{stem}.jsonl"
        self._file_bytes_max = file_bytes_max
        self._num_files_max = num_files_max
        self._open()

    def has_room(self) -> bool:
        """Always: old files make room."""
        return True

    def deliver(self, spans: Sequence[ReadableSpan]) -> None:
        """Append one line."""
        if self._exporter.export(spans) is not SpanExportResult.SUCCESS:
            self.num_spans_dropped += len(spans)
            self._exporter.shutdown()
            self._open()
        elif self._path.stat().st_size >= self._file_bytes_max:
            self._rotate()

    def close(self, timeout_s: float) -> None:
        """Close the file."""
        self._exporter.shutdown()

    def _open(self) -> None:
        _cut_torn_line(self._path)
        self._exporter = FileSpanExporter(self._path)

    def _rotate(self) -> None:
        self._exporter.shutdown()
        self._path.rename(self._path.with_name(f"{self._stem}.{time.time_ns():020d}.jsonl"))
        aside = sorted(self._path.parent.glob(f"{self._stem}.*.jsonl"))
        for path in aside[: max(0, len(aside) + 1 - self._num_files_max)]:
            path.unlink(missing_ok=True)
        self._open()


class OtlpDestination:
    """A collector behind a spool; see ``spool`` and ``sender``."""

    def __init__(
        self,
        folder: Path,
        *,
        client: RequestClient | None = None,
        spool_bytes_max: int = SPOOL_BYTES_DEFAULT,
    ) -> None:
        self._spool = Spool(folder, spool_bytes_max)
        self._sender = Sender(self._spool, client or OtlpClient())
        self._num_spans_unspooled = 0

    @property
    def num_spans_dropped(self) -> int:
        """Spans that the full spool or the collector refused."""
        return self._num_spans_unspooled + self._sender.num_spans_dropped

    def has_room(self) -> bool:
        """Whether one more request of the largest size fits into the spool."""
        return self._spool.has_room(REQUEST_BYTES_MAX)

    def deliver(self, spans: Sequence[ReadableSpan]) -> None:
        """Encode and spool a batch."""
        for request, num_spans in encode_requests(spans, REQUEST_BYTES_MAX):
            if not self._spool.put(request, num_spans):
                self._num_spans_unspooled += num_spans

    def close(self, timeout_s: float) -> None:
        """Send what waits; the rest stays in the spool for the next start."""
        self._sender.close(timeout_s)


def encode_requests(
    spans: Sequence[ReadableSpan], num_bytes_max: int
) -> Iterator[tuple[bytes, int]]:
    """Encoded requests, each under ``num_bytes_max``, and how many spans each holds.

    A batch that is too large is halved, down to a single span, which goes as it is.
    """
    request: bytes = encode_spans(spans).SerializeToString()
    if len(request) < num_bytes_max or len(spans) == 1:
        yield request, len(spans)
        return
    middle = len(spans) // 2
    yield from encode_requests(spans[:middle], num_bytes_max)
    yield from encode_requests(spans[middle:], num_bytes_max)


def choose_destination(
    state_dir: Path,
    stem: str,
    *,
    is_lossless: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> Destination:
    """What the standard ``OTEL_*`` variables ask for.

    Args:
        state_dir: Files go to its ``traces`` folder, the spool is its ``spool`` folder.
        stem: Name of the trace file, without its ending.
        is_lossless: Keep old trace files for ever.
        environment: Where the variables are looked up.

    Raises:
        OSError: if a folder cannot be made.
    """
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    is_disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_disabled or exporter == "none":
        return NowhereDestination()
    if any(environment.get(name, "").strip() for name in _ENDPOINT_VARIABLES):
        protocol = next(filter(None, map(environment.get, _PROTOCOL_VARIABLES)), "grpc")
        if protocol == "grpc":
            return OtlpDestination(state_dir / "spool")
        _logger.error(
            "traces are sent by OTLP over grpc only, not %s; they go to %s instead",
            protocol,
            state_dir / "traces",
        )
    num_files_max = 1_000_000 if is_lossless else NUM_FILES_MAX_DEFAULT
    return JsonLinesDestination(state_dir / "traces", stem, num_files_max=num_files_max)


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last line end: a writer was killed, or the disk was full."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65_536)
            file.seek(start)
            line_end = file.read(end - start).rfind(b"\n")
            if line_end >= 0:
                end = start + line_end + 1
                break
            end = start
        file.truncate(end)
