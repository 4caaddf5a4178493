"""Where a child's output goes: a bounded file, and a summary of what a person should see."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

LOG_BYTES_MAX = 32 * 1024 * 1024
_SUMMARY_CHARACTERS_MAX = 500
_LEFT_OUT = frozenset({"event", "level", "timestamp", "logger", "service"})
_ALARMING_LEVELS = frozenset({"warning", "error", "critical", "exception"})


class ServiceLog:
    """A log file that starts anew, keeping one predecessor, when it has grown large.

    Raises:
        OSError: from the constructor, when the file cannot be written.
    """

    def __init__(self, path: Path, *, bytes_max: int = LOG_BYTES_MAX) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._bytes_max = bytes_max
        self._file = path.open("ab")

    def write(self, lines: Sequence[bytes]) -> None:
        """Append lines as the child wrote them; what cannot be written is lost, and no more."""
        with contextlib.suppress(OSError):
            for line in lines:
                if self._file.tell() + len(line) > self._bytes_max:
                    self._start_anew()
                self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _start_anew(self) -> None:
        # Taken away by somebody, or by a turn before this one that then found no room for a file.
        with contextlib.suppress(FileNotFoundError):
            self.path.replace(self.path.with_suffix(".log.1"))
        full, self._file = self._file, self.path.open("ab")
        full.close()


def summarise(line: bytes) -> str | None:
    """A short text for a JSON log line of level warning or above; None for any other line."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or str(record.get("level")).lower() not in _ALARMING_LEVELS:
        return None
    event = record.get("event", record.get("message", ""))
    details = [
        f"{key}={_last_line(str(value))}"
        for key, value in record.items()
        if key not in _LEFT_OUT and isinstance(value, str | int) and str(value)
    ]
    return " ".join([f"{record['level']}:", str(event), *details])[:_SUMMARY_CHARACTERS_MAX]


def _last_line(text: str) -> str:
    """Of a stack trace the line that says what happened; the file has the rest."""
    return text.strip().rpartition("\n")[2].strip()
