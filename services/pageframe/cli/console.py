"""What a person sees while something takes its time; all of it on standard error.

On a terminal one line is redrawn; elsewhere each change is a line of its own, at most one every
two seconds for each subject, so that a log stays readable. Standard output is for results.
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import TaskID

_LINE_INTERVAL_SECONDS = 2.0


class Console(Protocol):
    """Shows lines that stay and progress that passes. A context manager."""

    def say(self, line: str) -> None:
        """Show a line that stays."""
        ...

    def progress(self, subject: str, message: str, fraction: float | None = None) -> None:
        """Show what ``subject`` is doing; ``fraction`` in [0, 1] where it is known."""
        ...

    def __enter__(self) -> Self:
        """Begin to draw."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was found."""
        ...


class PlainConsole:
    """For logs, pipes and CI."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._shown: dict[str, tuple[str, float]] = {}

    def say(self, line: str) -> None:
        """Write a line."""
        print(line, file=self._stream, flush=True)

    def progress(self, subject: str, message: str, fraction: float | None = None) -> None:
        """Write a line when the message is new, or its fraction has moved for two seconds."""
        last_message, last_time = self._shown.get(subject, ("", 0.0))
        now = self._clock()
        if message == last_message and (
            fraction is None or now - last_time < _LINE_INTERVAL_SECONDS
        ):
            return
        self._shown[subject] = (message, now)
        percent = "" if fraction is None or fraction >= 1.0 else f" {fraction:.0%}"
        self.say(f"{subject}: {message}{percent}")

    def __enter__(self) -> Self:
        """Begin; there is nothing to set up."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End; there is nothing to put back."""


class TerminalConsole:
    """For people: one redrawn row for each subject, with a bar where the end is known."""

    def __init__(self, stream: TextIO) -> None:
        # Imported here: elsewhere nothing is drawn.
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = RichConsole(file=stream, highlight=False, markup=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[subject]}: {task.description}", markup=False),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            # Results go to standard output as they are, even while rows are drawn.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live: Live = self._progress.live
        self._tasks: dict[str, TaskID] = {}

    def say(self, line: str) -> None:
        """Write a line above the rows."""
        self._console.print(line)

    def progress(self, subject: str, message: str, fraction: float | None = None) -> None:
        """Redraw the row of ``subject``; a finished one goes away."""
        if fraction is not None and fraction >= 1.0:
            self._finish(subject)
            return
        if subject not in self._tasks:
            self._tasks[subject] = self._progress.add_task(message, subject=subject, total=None)
            self._live.start()
        task_id = self._tasks[subject]
        total = None if fraction is None else 1.0
        self._progress.update(task_id, description=message, total=total, completed=fraction or 0.0)

    def _finish(self, subject: str) -> None:
        task_id = self._tasks.pop(subject, None)
        if task_id is not None:
            self._progress.remove_task(task_id)
        if not self._tasks:
            # With nothing to draw, the drawing thread would only keep the machine awake.
            self._live.stop()

    def __enter__(self) -> Self:
        """Begin; rows are drawn from the first progress on."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the rows."""
        for subject in list(self._tasks):
            self._finish(subject)


def open_console() -> Console:
    """The console that fits standard error."""
    return TerminalConsole(sys.stderr) if sys.stderr.isatty() else PlainConsole(sys.stderr)
