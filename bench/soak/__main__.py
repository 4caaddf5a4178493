"""The command: a million random changes of KV memory under audit; exit code 1 on a violation."""

import argparse
import json
import logging
import sys
from dataclasses import asdict

import structlog
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from bench.soak.lives import Life, lives_of
from bench.soak.run import Outcome, soak

NUM_OPERATIONS = 1_000_000
NUM_OPERATIONS_PER_LIFE = 5_000


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--operations", type=int, default=NUM_OPERATIONS, help="changes to ask for")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--life", type=int, help="only the life of this number")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    options = parser.parse_args(arguments)
    lives = lives_of(options.operations, NUM_OPERATIONS_PER_LIFE)
    if options.life is not None:
        lives = [Life(options.life, options.operations)]
    # Devices are made to fail here, which the engine would report each time.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    console = Console(stderr=True)
    columns = (
        TextColumn("seed {task.fields[seed]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("operations"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=options.operations, seed=options.seed)
        outcome = soak(
            lives,
            seed=options.seed,
            on_progress=lambda done: progress.update(task, completed=done),
        )
    if options.json:
        print(json.dumps(asdict(outcome), indent=2))
    _report(console, outcome)
    return 1 if outcome.violation else 0


def _report(console: Console, outcome: Outcome) -> None:
    rate = outcome.num_operations / max(outcome.seconds, 1e-9)
    console.print(
        f"seed {outcome.seed}: {outcome.num_operations} operations in {outcome.num_lives} lives, "
        f"{outcome.num_recounts} full recounts, {outcome.seconds:.0f} s, {rate:.0f} operations/s"
    )
    counts = ", ".join(f"{name} {number}" for name, number in outcome.num_records.most_common())
    console.print(f"operations on blocks: {counts}")
    if not outcome.violation:
        console.print("no violation")
        return
    print(outcome.violation, file=sys.stderr)
    console.print(
        f"violation at operation {outcome.operation} of life {outcome.life}; again with\n"
        f"  python -m bench.soak --seed {outcome.seed} --life {outcome.life} "
        f"--operations {outcome.operation + 1}"
    )


if __name__ == "__main__":
    sys.exit(main())
