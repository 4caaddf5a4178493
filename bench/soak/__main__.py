"""The command: ``python -m bench.soak``; see the package's text."""

import argparse
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

import structlog
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from bench.soak.audited_memory import AuditedMemory
from bench.soak.driver import Driver
from bench.soak.lives import Life, lives_of, random_of, shape_of

NUM_OPERATIONS_PER_LIFE = 5_000
NUM_OPERATIONS_BETWEEN_RECOUNTS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a soak went.

    Attributes:
        seed: Of everything random.
        num_operations: Changes that were asked for and audited.
        num_lives: Memories that were tested.
        num_recounts: Times that everything was compared.
        seconds: Wall time.
        num_records: Operations on blocks that came of it, by kind.
        violation: What was wrong at last; empty when nothing was.
        life: Number of the life in which it happened; -1 for none.
        operation: Number of the operation in that life.
    """

    seed: int
    num_operations: int
    num_lives: int
    num_recounts: int
    seconds: float
    num_records: dict[str, int]
    violation: str = ""
    life: int = -1
    operation: int = 0


def soak(
    lives: list[Life],
    *,
    seed: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Live these lives until something is wrong."""
    start_s = time.monotonic()
    num_operations = num_recounts = 0
    for index, life in enumerate(lives):
        source = random_of(seed, life.number)
        memory = AuditedMemory(shape_of(life.number, source))
        driver = Driver(memory, source)
        try:
            for number in range(life.num_operations):
                driver.act()
                num_operations += 1
                if (number + 1) % NUM_OPERATIONS_BETWEEN_RECOUNTS == 0:
                    memory.recount()
                    num_recounts += 1
                    on_progress(num_operations)
            driver.end()
            memory.recount()
            num_recounts += 1
            memory.expect_empty()
        except Exception:  # Whatever the memory raises is a finding, its assertions above all.
            return Outcome(
                seed=seed,
                num_operations=num_operations,
                num_lives=index,
                num_recounts=num_recounts,
                seconds=time.monotonic() - start_s,
                violation=traceback.format_exc(),
                life=life.number,
                operation=memory.num_operations,
            )
        on_progress(num_operations)
    return Outcome(
        seed=seed,
        num_operations=num_operations,
        num_lives=len(lives),
        num_recounts=num_recounts,
        seconds=time.monotonic() - start_s,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--operations", type=int, default=100_000, help="changes to ask for")
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
    else:
        _report(console, outcome)
    return 1 if outcome.violation else 0


def _report(console: Console, outcome: Outcome) -> None:
    rate = outcome.num_operations / max(outcome.seconds, 1e-9)
    console.print(
        f"seed {outcome.seed}: {outcome.num_operations} operations in {outcome.num_lives} lives, "
        f"{outcome.num_recounts} full recounts, {outcome.seconds:.0f} s, {rate:.0f} operations/s"
    )
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
