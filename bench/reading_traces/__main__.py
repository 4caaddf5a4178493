"""Provoke five stalls, check what their traces say, and draw them.

    python -m bench.reading_traces [NAME ...] --model FOLDER [--pictures DIR] [--keep DIR]
    python -m bench.reading_traces budget --model FOLDER --set "--prefill-chunk-tokens 16"

Exits 0 only if every trace says what it must. With ``--set`` other settings are tried on the same
load: who waited how long for what is printed, and nothing is judged or drawn.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bench.reading_traces.picture import picture_of
from bench.reading_traces.provocations import PROVOCATIONS, Outcome, command_of, find, provoke
from bench.reading_traces.verdict import faults_of
from pageframe.telemetry.stall_report import stall_report

PICTURES = Path("docs/images")


def told_by(outcome: Outcome) -> Iterator[str]:
    """Who waited how long for what, a line each."""
    for entry in stall_report(outcome.spans).requests:
        waits = sorted(entry.stall_ms.items(), key=lambda wait: -wait[1])
        parts = [f"{waited_ms:.0f} ms {cause}" for cause, waited_ms in waits if waited_ms >= 1]
        yield f"{entry.request_id} took {entry.elapsed_ms:.0f} ms: {', '.join(parts)}"


def judge(outcome: Outcome, pictures: Path) -> int:
    """Draw it, and say what is not as it must be; returns how many faults that are."""
    name = outcome.provocation.name
    faults = faults_of(outcome)
    for fault in faults:
        print(f"{name}: {fault}", flush=True)
    pictures.mkdir(parents=True, exist_ok=True)
    (pictures / f"trace-{name}.svg").write_text(picture_of(outcome), encoding="utf-8")
    return len(faults)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description="Provoke stalls and draw their traces.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; all when none is given")
    parser.add_argument("--model", required=True, help="a prepared model's folder")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="where pictures go")
    parser.add_argument("--keep", type=Path, help="leave traces and logs in a folder each here")
    parser.add_argument("--set", default="", help="options of `pageframe up` to try")
    arguments = parser.parse_args()
    names = [provocation.name for provocation in PROVOCATIONS]
    unknown = set(arguments.names) - set(names)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    console, num_faults = Console(stderr=True), 0
    with Progress(console=console) as progress:
        task = progress.add_task("stalls", total=len(arguments.names or names))
        for name in arguments.names or names:
            provocation = find(name)
            provocation = replace(
                provocation, options=(*provocation.options, *shlex.split(arguments.set))
            )
            console.print(f"{name}: {' '.join(command_of(provocation))}", soft_wrap=True)
            keep = arguments.keep / name if arguments.keep else None
            outcome = provoke(provocation, arguments.model, keep)
            for line in told_by(outcome):
                print(f"{name}: {line}", flush=True)
            if not arguments.set:
                num_faults += judge(outcome, arguments.pictures)
            progress.advance(task)
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
