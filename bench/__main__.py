"""Everything that a CPU has to reach, measured one thing after the other, and judged.

    python -m bench [--only engines] [--peer openvino=PYTHON]
        [--peer-environment openvino:NAME=VALUE]

Each part is a bench of its own, run as it would be by hand; its figures go to the folder, and a
table tells which were reached. Half an hour on a machine with nothing else to do; with other work
beside, only ratios mean something. Peers are installed by whoever measures: see ``bench.engines``.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import cpu_goals
from bench.cpu_goals import Finding, Judge

RESULTS = Path(__file__).parent / "results"

Command = Callable[[argparse.Namespace, Path], list[str]]
"""What runs a part, so that its figures come to a file."""


@dataclass(frozen=True, slots=True)
class Part:
    """One bench.

    Attributes:
        command: What runs it. It may fail by its own judgement: figures count here.
        judge: Reads its figures.
        is_told: Whether it writes figures to its standard output, and not to the file itself.
    """

    command: Command
    judge: Judge
    is_told: bool = False

    def run(self, options: argparse.Namespace, path: Path) -> list[Finding]:
        """Measure; what is found.

        Raises:
            RuntimeError: it ended without figures.
        """
        path.unlink(missing_ok=True)
        command = self.command(options, path)
        output = subprocess.PIPE if self.is_told else sys.stderr
        ended = subprocess.run(command, stdout=output, check=False)
        if self.is_told and ended.stdout:
            path.write_bytes(ended.stdout)
        if not path.exists():
            raise RuntimeError(f"exit code {ended.returncode} and no figures: {' '.join(command)}")
        return list(self.judge(json.loads(path.read_text(encoding="utf-8"))))


def _bench(module: str, *words: str) -> Command:
    return lambda _, path: [sys.executable, "-m", module, *words, "--output", str(path)]


def _engines(options: argparse.Namespace, path: Path) -> list[str]:
    asked = subprocess.run(
        ["pageframe", "model", "prepare", options.model], capture_output=True, text=True, check=True
    )
    words = [f"--model={asked.stdout.strip()}", f"--repetitions={options.repetitions}"]
    words += [f"--workloads={options.workloads}"]
    words += [f"--peer={peer}" for peer in options.peer]
    words += [f"--peer-environment={entry}" for entry in options.peer_environment]
    return _bench("bench.engines", *words)(options, path)


def _split(options: argparse.Namespace, _: Path) -> list[str]:
    return ["pageframe", "bench", "split", "--json", f"--model={options.model}"]


PARTS = {
    "engines": Part(_engines, cpu_goals.of_engines),
    "split": Part(_split, cpu_goals.of_split, is_told=True),
    "tracing": Part(_bench("bench.tracing_cost"), cpu_goals.of_tracing),
    "tracing_native": Part(
        _bench("bench.tracing_cost", "--runner", "native"), cpu_goals.of_tracing
    ),
    "cpu_attention": Part(_bench("bench.cpu_attention", "--threads", "2"), cpu_goals.of_attention),
    "starting": Part(_bench("bench.starting", "--starts", "8"), cpu_goals.of_starting),
}
"""By the name of the file that figures go to."""


def measure(options: argparse.Namespace) -> list[Finding]:
    """All parts, one after the other; one without figures does not take the others along."""
    findings: list[Finding] = []
    for name in options.only or PARTS:
        start_s = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            findings += PARTS[name].run(options, options.folder / f"{name}.json")
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(error, file=sys.stderr)
            findings.append(Finding(what=name, found=None, border=0))
        print(f"{name}: {time.monotonic() - start_s:.0f} s", file=sys.stderr, flush=True)
    return findings


def as_table(findings: Sequence[Finding]) -> str:
    """Markdown, a line for each finding."""
    lines = ["| what | found | asked | verdict |", "|---|---:|---:|---|"]
    for each in findings:
        found = "" if each.found is None else f"{each.found:.3f}"
        sign = "<=" if each.is_low_better else ">="
        lines.append(f"| {each.what} | {found} | {sign} {each.border:g} | {each.verdict} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and judge; 1 if something was missed or could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="parts to measure")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--workloads", default="ABCDE", help="of the engines")
    parser.add_argument("--repetitions", type=int, default=3, help="of the engines, that count")
    parser.add_argument("--peer", action="append", default=[], metavar="KIND[:NAME]=PYTHON")
    parser.add_argument(
        "--peer-environment", action="append", default=[], metavar="NAME:VARIABLE=VALUE"
    )
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where figures go")
    options = parser.parse_args(words)
    findings = measure(options)
    print(as_table(findings))
    return int(any(each.verdict != "met" for each in findings))


if __name__ == "__main__":
    sys.exit(main())
