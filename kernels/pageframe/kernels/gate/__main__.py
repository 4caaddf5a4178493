"""``python -m pageframe.kernels.gate``: compile all that serves; exit 1 with the reasons if bad.

Compiles with whatever Triton is installed; no GPU, no driver and no PyTorch are needed.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Triton's own default, said aloud: later versions warn where it is left open.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton

from pageframe.kernels.gate.judgement import faults, num_wide_loads
from pageframe.kernels.gate.machine_code import CompileError, MachineCode, compile_variant
from pageframe.kernels.gate.serving import serving_variants
from pageframe.kernels.jit.variants import SHARED_BYTES_MAX, Variant

_HEADER = (
    f"{'chip':7}{'variant':52}{'warps':>6}{'regs':>6}{'stack':>6}{'shared':>8}"
    f"{'wide':>6}{'seconds':>9}  verdict"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One variant, compiled and judged.

    Attributes:
        name: Of the variant.
        capability: Of the chip.
        num_warps: Per program.
        code: What it became; None if it did not compile.
        faults: Why it must not serve; empty if it may.
    """

    name: str
    capability: int
    num_warps: int
    code: MachineCode | None
    faults: list[str]


def judge(variant: Variant) -> Outcome:
    """Compile a variant and judge it."""
    code, found = None, []
    try:
        code = compile_variant(variant)
        found = faults(variant, code)
    except CompileError as error:
        found = [f"does not compile: {error}"]
    return Outcome(
        name=variant.name,
        capability=variant.capability,
        num_warps=variant.num_warps,
        code=code,
        faults=found,
    )


def judge_all(variants: Sequence[Variant], num_processes: int) -> Iterator[Outcome]:
    """Judge all variants, in their order, ``num_processes`` at a time."""
    if num_processes == 1:
        yield from map(judge, variants)
        return
    # Kernels do not travel between processes: a fork has them, and is told places in the list.
    _SHARED_LIST[:] = variants
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        yield from pool.imap(_judge_place, range(len(variants)))


_SHARED_LIST: list[Variant] = []


def _judge_place(place: int) -> Outcome:
    return judge(_SHARED_LIST[place])


def as_line(outcome: Outcome) -> str:
    """A line of the table."""
    code = outcome.code
    figures = f"{'-':>6}{'-':>6}{'-':>8}{'-':>6}{'-':>9}"
    if code is not None:
        figures = (
            f"{code.registers:6}{code.stack_bytes:6}{code.shared_bytes:8}"
            f"{num_wide_loads(code):6}{code.seconds:9.1f}"
        )
    verdict = "ok" if not outcome.faults else "BAD: " + "; ".join(outcome.faults)
    chip = f"sm_{outcome.capability}"
    return f"{chip:7}{outcome.name:52}{outcome.num_warps:6}{figures}  {verdict}"


def chosen_variants(arguments: argparse.Namespace) -> list[Variant]:
    """What the command line asks for."""
    return [
        variant
        for variant in serving_variants()
        if variant.capability in (arguments.capability or SHARED_BYTES_MAX)
        and arguments.only in variant.name
    ]


def main(words: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pageframe.kernels.gate")
    parser.add_argument("--capability", type=int, action="append", choices=sorted(SHARED_BYTES_MAX))
    parser.add_argument("--only", default="", help="variants whose name holds this text")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--quiet", action="store_true", help="name only what is bad")
    arguments = parser.parse_args(words)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: interpreted kernels do not compile")
    variants = chosen_variants(arguments)
    if not variants:
        parser.error("no variant is asked for")

    start = time.monotonic()
    outcomes = []
    if not arguments.quiet:
        _say(_HEADER)
    for outcome in judge_all(variants, arguments.processes):
        outcomes.append(outcome)
        if outcome.faults or not arguments.quiet:
            _say(as_line(outcome))
    num_bad = sum(bool(outcome.faults) for outcome in outcomes)
    seconds = time.monotonic() - start
    if arguments.json:
        report = {
            "triton": triton.__version__,
            "seconds": seconds,
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _say(f"triton {triton.__version__}: {len(outcomes)} variants in {seconds:.0f} s, {num_bad} bad")
    return 1 if num_bad else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
