"""The ``pageframe`` command: starts what it is sure to need, and then looks what was asked for."""

import os
import sys
from collections.abc import Sequence

from pageframe.cli.ahead import started_ahead
from pageframe.cli.exit_codes import EXIT_INTERRUPTED
from pageframe.config.imports import collecting_no_garbage


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with one of the codes of ``exit_codes``."""
    try:
        if arguments is None:
            _run_ahead(sys.argv[1:])
        else:
            _run(arguments)
    except KeyboardInterrupt:
        print("pageframe: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None


def _run_ahead(given: Sequence[str]) -> None:
    with started_ahead(given, os.environ) as ahead:
        with collecting_no_garbage():
            from pageframe.cli.commands import run
        run(given, ahead)


def _run(given: Sequence[str]) -> None:
    from pageframe.cli.commands import run

    run(given)
