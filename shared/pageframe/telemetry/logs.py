"""Structured logs: one JSON object a line on standard error, with the trace it belongs to.

Lines of the standard ``logging`` module (grpc, transformers, OpenTelemetry) take the same form.
"""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from pageframe.core.errors import InvalidRequestError

_LEVEL_VARIABLE: Final = "PAGEFRAME_LOG_LEVEL"
_LEVELS: Final[Mapping[str, int]] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class _LineWriter:
    """Writes lines, of any thread; what cannot be written is lost: a full disk ends no request."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        # One that a signal's handler may take once more.
        self._lock = threading.RLock()

    def msg(self, line: str) -> None:
        # ValueError: the file was closed, at the end of a process.
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._file.write(line + "\n")
            self._file.flush()

    debug = info = warning = error = critical = exception = msg


def configure(
    service: str,
    level: str | None = None,
    json: bool = True,
    *,
    stream: TextIO | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Set up logging of this process; the last call counts.

    Args:
        service: Name in every line.
        level: ``debug``, ``info``, ``warning`` or ``error``; ``PAGEFRAME_LOG_LEVEL`` when None,
            ``info`` when that is not set either.
        json: JSON lines; else text for a person.
        stream: Where lines go; standard error when None.
        environment: Where the variable is looked up.

    Raises:
        InvalidRequestError: if the level is none of the four.
    """
    number = _level_number(level, environment)

    def add_service(_logger: Any, _method: str, event: EventDict) -> EventDict:
        event["service"] = service
        return event

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_service,
        structlog.processors.format_exc_info,
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer(colors=False)
    )
    file = stream or sys.stderr
    writer = _LineWriter(file)
    # Our own lines are written straight away: by way of ``logging`` each would cost twice as much.
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_names: writer,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(file)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)


def get_logger(**bound: Any) -> FilteringBoundLogger:
    """A logger; ``bound`` goes into each of its lines."""
    return cast("FilteringBoundLogger", structlog.get_logger(**bound))


@contextlib.contextmanager
def trace_bound(trace_id: bytes, span_id: int) -> Iterator[None]:
    """Give all lines of this task, or thread, the trace and span they belong to."""
    if not trace_id:
        yield
        return
    with structlog.contextvars.bound_contextvars(
        trace_id=trace_id.hex(), span_id=f"{span_id:016x}"
    ):
        yield


def _level_number(level: str | None, environment: Mapping[str, str]) -> int:
    name = level if level is not None else environment.get(_LEVEL_VARIABLE, "") or "info"
    number = _LEVELS.get(name.strip().lower())
    if number is None:
        where = "the log level" if level is not None else _LEVEL_VARIABLE
        raise InvalidRequestError(
            "LOG_LEVEL_INVALID", f"{where} must be one of {', '.join(_LEVELS)}, not {name!r}"
        )
    return number
