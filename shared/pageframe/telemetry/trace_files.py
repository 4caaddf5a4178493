"""OTLP JSON lines in a folder: where traces go without a collector."""

import logging
import os
import time
from pathlib import Path
from typing import Final

from pageframe.telemetry.json_form import JsonForm
from pageframe.telemetry.span_form import SpanForm

_logger = logging.getLogger(__name__)

FILE_BYTES_MAX_DEFAULT: Final = 128 * 1024 * 1024
NUM_FILES_MAX_DEFAULT: Final = 8
_TAIL_BYTES: Final = 65_536


class TraceFiles:
    """The newest lines in ``<stem>.jsonl``; Jaeger's UI opens them.

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
        self.form: SpanForm = JsonForm()
        self._stem = stem
        self._path = folder / f"{stem}.jsonl"
        self._file_bytes_max = file_bytes_max
        self._num_files_max = num_files_max
        self._open()

    def send(self, request: bytes) -> bool:
        """Append a line; False when it cannot be written, and nothing of it is left then."""
        try:
            if self._file.closed:
                self._open()
            line = memoryview(request)
            while line:
                line = line[self._file.write(line) :]
            if self._file.tell() >= self._file_bytes_max:
                self._rotate()
        except OSError as error:
            _logger.warning("cannot write to %s: %s", self._path, error)
            self._file.close()  # Opened again, and what was torn cut off, by the next attempt.
            return False
        return True

    def is_reachable(self) -> bool:
        """Always: nobody else has to be there."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> None:
        _cut_torn_line(self._path)
        # Unbuffered: a line is one write, and what is written is safe from the end of this process.
        self._file = self._path.open("ab", buffering=0)

    def _rotate(self) -> None:
        self._file.close()
        self._path.rename(self._path.with_name(f"{self._stem}.{time.time_ns():020d}.jsonl"))
        aside = sorted(self._path.parent.glob(f"{self._stem}.*.jsonl"))
        for path in aside[: max(0, len(aside) + 1 - self._num_files_max)]:
            path.unlink(missing_ok=True)
        self._open()


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last line end: a writer was killed, or the disk was full."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _TAIL_BYTES)
            file.seek(start)
            line_end = file.read(end - start).rfind(b"\n")
            if line_end >= 0:
                end = start + line_end + 1
                break
            end = start
        file.truncate(end)
