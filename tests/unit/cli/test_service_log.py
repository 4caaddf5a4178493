"""What a child writes: kept in a bounded file, and shown only when it matters."""

import io
import json
import sys
import threading
from pathlib import Path

import pytest

from pageframe.cli.console import PlainConsole, TerminalConsole
from pageframe.cli.service_log import ServiceLog, summarise


def line(**record: object) -> bytes:
    return json.dumps(record).encode() + b"\n"


def test_warnings_and_errors_are_summarised_in_one_line() -> None:
    text = summarise(
        line(level="error", event="failed", timestamp="now", service="s", reason="X",
             exception="Traceback:\n  File\nValueError: no luck\n")
    )  # fmt: skip
    assert text == "error: failed reason=X exception=ValueError: no luck"


@pytest.mark.parametrize(
    "quiet",
    [line(level="info", event="ready"), b"Traceback (most recent call last):\n", b"[1]\n", b"{\n"],
)
def test_other_lines_are_not_shown(quiet: bytes) -> None:
    assert summarise(quiet) is None


def test_a_log_starts_anew_and_keeps_one_predecessor(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "executor.log"
    log = ServiceLog(path, bytes_max=20)
    for number in range(5):
        log.write([b"line %d ....\n" % number])
    log.close()
    assert path.read_bytes() == b"line 4 ....\n"
    assert path.with_suffix(".log.1").read_bytes() == b"line 3 ....\n"


def test_a_log_is_continued_by_the_next_run(tmp_path: Path) -> None:
    for text in (b"first\n", b"second\n"):
        log = ServiceLog(tmp_path / "executor.log")
        log.write([text])
        log.close()
    assert (tmp_path / "executor.log").read_bytes() == b"first\nsecond\n"


def test_lines_of_one_read_are_kept_apart_when_a_log_starts_anew(tmp_path: Path) -> None:
    log = ServiceLog(tmp_path / "executor.log", bytes_max=20)
    log.write([b"line 0 ....\n", b"line 1 ....\n", b"2\n"])
    log.close()
    assert (tmp_path / "executor.log").read_bytes() == b"line 1 ....\n2\n"
    assert (tmp_path / "executor.log.1").read_bytes() == b"line 0 ....\n"


def test_a_log_that_was_taken_away_starts_anew(tmp_path: Path) -> None:
    log = ServiceLog(tmp_path / "executor.log", bytes_max=20)
    log.write([b"line 0 ....\n"])
    log.path.unlink()
    for number in (1, 2):
        log.write([b"line %d ....\n" % number])
    log.close()
    assert log.path.read_bytes() == b"line 2 ....\n"
    assert (tmp_path / "executor.log.1").read_bytes() == b"line 1 ....\n"


def test_a_full_disk_loses_lines_and_ends_nobody() -> None:
    log = ServiceLog(Path("/dev/full"))
    for _ in range(3):
        log.write([b"x" * 10_000 + b"\n"])
    log.close()


def test_progress_elsewhere_than_a_terminal_is_a_line_every_two_seconds() -> None:
    now = 0.0
    stream = io.StringIO()
    with PlainConsole(stream, clock=lambda: now) as console:
        console.progress("model", "downloading", 0.1)
        now = 1.0
        console.progress("model", "downloading", 0.2)
        now = 2.0
        console.progress("model", "downloading", 0.3)
        console.progress("executor", "loading")
        now = 9.0
        console.progress("executor", "loading")
        console.progress("model", "converting", 0.5)
    assert stream.getvalue().splitlines() == [
        "model: downloading 10%",
        "model: downloading 30%",
        "executor: loading",
        "model: converting 50%",
    ]


def test_rows_on_a_terminal_leave_standard_output_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The ready line must reach a pipe, even when progress is drawn on a terminal."""
    stream = io.StringIO()
    others = set(threading.enumerate())
    with TerminalConsole(stream) as console:
        console.progress("executor", "loading", 0.5)
        sys.stdout.write("pageframe ready\n")
        console.say("a line that stays")
        console.progress("executor", "ready", 1.0)
        drawing = set(threading.enumerate()) - others
        for thread in drawing:
            thread.join(timeout=10.0)
            assert not thread.is_alive(), "nothing is drawn when there is nothing to draw"
    assert capsys.readouterr().out == "pageframe ready\n"
    assert "a line that stays" in stream.getvalue()
