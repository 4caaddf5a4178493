"""``python -m pageframe.telemetry``: the exporter process beside the services."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from pageframe.telemetry.destinations import choose_destination
from pageframe.telemetry.exporter import Exporter, lower_priority
from pageframe.telemetry.logs import configure, get_logger
from pageframe.telemetry.process import ProcessIdentity
from pageframe.telemetry.ring_path import remove_dead_rings
from pageframe.telemetry.spool import SPOOL_BYTES_DEFAULT
from pageframe.telemetry.supervise import DRAIN_S_DEFAULT

_EXIT_USAGE: Final = 2
_LOOK_INTERVAL_S: Final = 1.0


class _StopSignal:
    """Waits for SIGTERM, which stays blocked: so it ends a wait at once, and nothing else.

    Attributes:
        came: Whether it came.
    """

    def __init__(self) -> None:
        self.came = False
        # ``supervise`` starts this process with both blocked, so that none was missed until now.
        # Threads inherit what is blocked, so this comes before the first of them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        # Ctrl-C reaches the whole process group: services drain first, then the supervisor
        # ends this process.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def wait(self, timeout_s: float) -> bool:
        """Whether it came, now or within so many seconds."""
        if not self.came:
            self.came = signal.sigtimedwait({signal.SIGTERM}, timeout_s) is not None
        return self.came


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line; ends the process when they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m pageframe.telemetry",
        description="Turns trace records of Pageframe services into OpenTelemetry spans.",
    )
    parser.add_argument(
        "--ring", type=Path, action="append", required=True, help="ring of a service; repeatable"
    )
    parser.add_argument("--state-dir", type=Path, required=True, help="for traces and the spool")
    parser.add_argument("--parent-pid", type=int, help="drain and end when this process dies")
    parser.add_argument(
        "--file-stem",
        default="pageframe",
        help="name of the trace file, when no collector is configured",
    )
    parser.add_argument("--lossless", action="store_true", help="never delete old trace files")
    parser.add_argument(
        "--drain-seconds", type=float, default=DRAIN_S_DEFAULT, help="bound for the last flush"
    )
    parser.add_argument(
        "--spool-bytes",
        type=int,
        default=SPOOL_BYTES_DEFAULT,
        help="bound of what waits on disk to be sent; beyond it records are dropped",
    )
    return parser.parse_args(arguments)


def _orphan_watch(parent_pid: int | None) -> Callable[[], bool]:
    """Says whether the parent is dead, by what was seen at most ``_LOOK_INTERVAL_S`` ago.

    To look takes longer than all that an idle pass over the rings does.
    """
    if parent_pid is None:
        return lambda: False
    parent = ProcessIdentity.of(parent_pid)
    is_dead = False
    next_look_s = 0.0

    def is_orphan() -> bool:
        nonlocal is_dead, next_look_s
        now_s = time.monotonic()
        if not is_dead and now_s >= next_look_s:
            next_look_s = now_s + _LOOK_INTERVAL_S
            is_dead = not parent.is_alive()
        return is_dead

    return is_orphan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or the parent's death, then drain; the exit code."""
    options = parse_arguments(arguments)
    stop = _StopSignal()
    configure("pageframe-telemetry")
    lower_priority()
    is_orphan = _orphan_watch(options.parent_pid)
    try:
        destination = choose_destination(
            options.state_dir,
            options.file_stem,
            is_lossless=options.lossless,
            spool_bytes_max=options.spool_bytes,
        )
    except Exception as error:  # The exporter package raises its own for a bad OTEL_* value.
        get_logger().error("cannot start exporting", error=str(error))
        return _EXIT_USAGE

    for path in remove_dead_rings():
        get_logger().info("removed the ring of a run that was killed", path=str(path))
    exporter = Exporter(options.ring, destination)
    exporter.run(lambda timeout_s: stop.wait(timeout_s) or is_orphan())
    exporter.drain(options.drain_seconds, until_finished=not stop.came)
    return 0


if __name__ == "__main__":
    sys.exit(main())
