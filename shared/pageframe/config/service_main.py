"""The command line that all service processes have in common."""

import argparse
import contextlib
import functools
import gc
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from pageframe.config.launch import Launch
from pageframe.rpc.lifecycle import run_service
from pageframe.telemetry.logs import configure

Serve = Callable[[Launch], Awaitable[None]]
"""Serves as a launch file says, until told to stop."""


@contextlib.contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """Import or load in the block, without looking for garbage among what is there to stay.

    Modules and weights live as long as the process. While they come, the collector would go through
    all that came before, again and again; behind the block it never looks at them any more.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_from_launch_file(name: str, load: Callable[[], Serve]) -> None:
    """Run a service as its launch file says, then exit with the code of ``run_service``.

    Refuses to run without assertions: they guard the pool (``python -O`` strips them).

    Args:
        name: For logs, for example ``pageframe-gateway``.
        load: Imports the service.
    """
    if not __debug__:
        sys.exit(f"{name}: assertions are off (python -O); they guard the block pool. Run without.")
    with collecting_no_garbage():
        serve = load()
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--settings", type=Path, required=True, help="launch file")
    launch = Launch.read(parser.parse_args().settings)
    configure(name, launch.settings.log_level.value)
    run_service(name, functools.partial(serve, launch))
