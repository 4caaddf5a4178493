"""The command line that all service processes have in common."""

import argparse
import functools
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from pageframe.config.launch import Launch
from pageframe.rpc.lifecycle import run_service
from pageframe.telemetry.logs import configure


def run_from_launch_file(name: str, serve: Callable[[Launch], Awaitable[None]]) -> None:
    """Run a service as its launch file says, then exit with the code of ``run_service``.

    Refuses to run without assertions: they guard the pool (``python -O`` strips them).
    """
    if not __debug__:
        sys.exit(f"{name}: assertions are off (python -O); they guard the block pool. Run without.")
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--settings", type=Path, required=True, help="launch file")
    launch = Launch.read(parser.parse_args().settings)
    configure(name, launch.settings.log_level.value)
    run_service(name, functools.partial(serve, launch))
