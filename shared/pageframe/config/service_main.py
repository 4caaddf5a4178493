"""The command line that all service processes have in common."""

import argparse
import functools
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pageframe.config.imports import collecting_no_garbage, without

if TYPE_CHECKING:
    from pageframe.config.launch import Launch

Serve = Callable[["Launch"], Awaitable[None]]
"""Serves as a launch file says, until told to stop."""

STANDARD_INPUT = Path("-")
"""In the place of a launch file: its name comes on standard input, as soon as there is one."""


def run_from_launch_file(name: str, load: Callable[[], Serve]) -> None:
    """Run a service as its launch file says, then exit with the code of ``run_service``.

    Refuses to run without assertions: they guard the pool (``python -O`` strips them).

    Args:
        name: For logs, for example ``pageframe-gateway``.
        load: Imports the service.
    """
    if not __debug__:
        sys.exit(f"{name}: assertions are off (python -O); they guard the block pool. Run without.")
    # structlog would have rich draw tracebacks for people; ours are lines of JSON.
    with collecting_no_garbage(), without("rich"):
        from pageframe.config.launch import Launch
        from pageframe.rpc.lifecycle import run_service
        from pageframe.telemetry.logs import configure

        serve = load()
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument(
        "--settings",
        type=Path,
        required=True,
        help="launch file; - to be told which",
    )
    path = parser.parse_args().settings
    launch = Launch.read(_told_path() if path == STANDARD_INPUT else path)
    configure(name, launch.settings.log_level.value)
    run_service(name, functools.partial(serve, launch))


def _told_path() -> Path:
    """Wait for the name of the launch file; whoever goes away without one wants no service."""
    told = sys.stdin.buffer.read()
    if not told:
        sys.exit(0)
    return Path(os.fsdecode(told))
