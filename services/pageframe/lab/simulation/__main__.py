"""``python -m pageframe.lab.simulation``: run seeds, and tell which of them break something.

The exit code is 0 when all is well, 1 when a seed broke something.
"""

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Iterator

from pageframe.lab.simulation.run import Outcome, simulate

_NUM_SHOWN_MAX = 5


def main(arguments: list[str] | None = None) -> int:
    """Run the seeds of the command line; returns the exit code."""
    options = _parse(arguments)
    first, last = options.seeds or (options.seed, options.seed + 1)
    num_broken, start_s = 0, time.monotonic()
    for outcome in run_seeds(first, last, keeps_lines=options.log):
        num_broken += bool(outcome.violations)
        if options.json:
            print(json.dumps(dataclasses.asdict(outcome)))  # noqa: T201
        elif outcome.violations or last - first == 1:
            _show(outcome)
    if last - first > 1:
        elapsed_s = time.monotonic() - start_s
        print(  # noqa: T201
            f"{last - first} seeds, {num_broken} broken, {elapsed_s / (last - first):.3f} s each",
            file=sys.stderr,
        )
    return 1 if num_broken else 0


def run_seeds(first: int, last: int, *, keeps_lines: bool = False) -> Iterator[Outcome]:
    """Run the seeds ``[first, last)``, one after the other."""
    # The collector finds nothing in the midst of a seed that would not keep until its end.
    was_enabled = gc.isenabled()
    gc.disable()
    # What is there already will be there at the end, too: no need to look at it after each seed.
    gc.freeze()
    try:
        for seed in range(first, last):
            yield simulate(seed, keeps_lines=keeps_lines)
            gc.collect()
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def _show(outcome: Outcome) -> None:
    for line in outcome.lines:
        print(line)  # noqa: T201
    print(  # noqa: T201
        f"seed {outcome.seed}: hash {outcome.digest}, {outcome.num_requests} requests, "
        f"{outcome.num_events} events, {outcome.virtual_s:.3f} s of virtual time"
    )
    for violation in outcome.violations[:_NUM_SHOWN_MAX]:
        print(f"  {violation}")  # noqa: T201
    if len(outcome.violations) > _NUM_SHOWN_MAX:
        print(f"  and {len(outcome.violations) - _NUM_SHOWN_MAX} more")  # noqa: T201


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pageframe.lab.simulation",
        description="Simulate the whole system in virtual time, with faults that the seed draws.",
    )
    parser.add_argument("--seed", type=int, default=0, help="the seed to run")
    parser.add_argument(
        "--seeds", type=_range, metavar="A:B", help="run the seeds from A up to B, B left out"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a seed")
    parser.add_argument("--log", action="store_true", help="print everything that happens")
    return parser.parse_args(arguments)


def _range(text: str) -> tuple[int, int]:
    first, separator, last = text.partition(":")
    if not separator or not first.isdecimal() or not last.isdecimal() or int(first) >= int(last):
        raise argparse.ArgumentTypeError(f"must be A:B with A below B, such as 0:300; got {text}")
    return int(first), int(last)


if __name__ == "__main__":
    sys.exit(main())
