"""Starts the executor before anybody knows what it is to serve: its imports do not depend on that.

    pageframe up ──▶ imports ─▶ settings ─▶ checks ─▶ model ──┐
        └─▶ executor ─▶ imports ──────────────────────────────┴─ launch file ─▶ loads the model

It waits for the name of its launch file on its standard input, and ends when that ends without one.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pageframe.cli.spawn import Spawned, module_command, spawn
from pageframe.config.variables import num_threads_unless_set, service_environment

EXECUTOR = "executor"
_QUESTIONS = frozenset({"--help", "-h"})


class Ahead:
    """An executor that was started ahead."""

    def __init__(self, spawned: Spawned) -> None:
        self.spawned = spawned

    def tell(self, launch_path: Path) -> None:
        """Have it go on, as a launch file says. One that has ended is noticed by whoever waits."""
        stdin = self.spawned.process.stdin
        assert stdin is not None, "a pipe was asked for"
        with contextlib.suppress(BrokenPipeError), stdin:
            stdin.write(os.fsencode(launch_path))

    def end(self) -> None:
        """End it, if it is there still."""
        process: subprocess.Popen[bytes] = self.spawned.process
        if process.poll() is None:
            process.kill()
            process.wait()


@contextlib.contextmanager
def started_ahead(arguments: Sequence[str], environ: Mapping[str, str]) -> Iterator[Ahead | None]:
    """What a command line is sure to need, started; it has ended behind the block.

    None for a command that serves nothing, and where it cannot be started: then somebody else will
    try, and say why.
    """
    if arguments[:1] != ["up"] or not _QUESTIONS.isdisjoint(arguments):
        yield None
        return
    num_threads = num_threads_unless_set(environ)
    command = module_command(f"pageframe.{EXECUTOR}", "--settings", "-")
    try:
        ahead = Ahead(spawn(command, service_environment(environ, num_threads), is_told=True))
    except OSError:
        yield None
        return
    try:
        yield ahead
    finally:
        ahead.end()
