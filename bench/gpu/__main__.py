"""``python -m bench.gpu``: measure every kernel on this machine's GPU; print, and keep the figures.

``--dry-run`` needs no GPU: everything runs once, tiny and interpreted, to see that it does run.
``--peer`` measures whole engines alone: ours and another one in turns.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Before any kernel is defined: it cannot change over later.
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch

from bench.gpu import attention, end_to_end, overlap, small
from bench.gpu.goals import GOALS
from bench.gpu.lab import LLAMA_3_8B, TINY, Lab
from bench.gpu.loads import EngineError
from bench.gpu.other_engines import PEERS, check_installed
from bench.gpu.timing import clocks, machine_facts

# Goals first, in case time runs out.
PARTS: dict[str, Callable[[Lab], None]] = {
    "copy": small.copy_bandwidth,
    "decode": attention.decode,
    "prefill": attention.prefill,
    "rotary": small.rotary,
    "block-copies": small.block_copies,
    "swaps": small.swaps,
    "swaps-beside-steps": overlap.swaps_beside_steps,
    "end-to-end": end_to_end.measure,
    "decode-quantised": attention.decode_quantised,
    "decode-skewed": attention.decode_skewed,
    "decode-block-sizes": attention.decode_block_sizes,
    "tokens": small.tokens,
    "norm": small.norm,
    "activation": small.activation,
}


def measure(
    lab: Lab,
    parts: dict[str, Callable[[Lab], None]],
    num_seconds: float,
    save: Callable[[], None],
) -> None:
    """Measure parts one after the other; none is begun after ``num_seconds``.

    ``save`` is called after each: whoever ends this early has what was found by then.
    """
    start = time.monotonic()
    for part, act in parts.items():
        if time.monotonic() - start > num_seconds:
            lab.skipped[part] = f"{num_seconds:.0f} seconds were over"
            continue
        # A part that breaks must not take the figures of the others along.
        try:
            act(lab)
        except Exception as error:
            lab.skipped[part] = f"{type(error).__name__}: {error}"
        gc.collect()
        if not lab.is_dry:
            torch.cuda.empty_cache()
        save()
        print(f"{time.monotonic() - start:6.1f} s  {part}", file=sys.stderr, flush=True)


def table(lab: Lab) -> list[str]:
    """All figures, then all goals, as Markdown."""
    lines = [
        "| kernel | us | TB/s | TFLOP/s | others, us |",
        "|---|---:|---:|---:|---|",
    ]
    for each in lab.found.values():
        others = "; ".join(
            f"{peer} {seconds * 1e6:.1f}" if isinstance(seconds, float) else f"{peer} {seconds}"
            for peer, seconds in each.peers.items()
        )
        flops = f"{each.flops_per_second / 1e12:.0f}" if each.num_flops else ""
        lines.append(
            f"| {each.name} | {each.seconds * 1e6:.1f} | {each.bytes_per_second / 1e12:.2f} "
            f"| {flops} | {others} |"
        )
    lines += ["", "| goal | found | must | stretch | verdict |", "|---|---:|---:|---:|---|"]
    for goal in GOALS:
        value, verdict = goal.judge(lab)
        shown = "" if value is None else f"{value:.3g}"
        lines.append(f"| {goal.name} | {shown} | {goal.must:g} | {goal.stretch:g} | {verdict} |")
    lines += ["", *(f"skipped {part}: {why}" for part, why in lab.skipped.items())]
    return [*lines, *end_to_end.table(lab)]


def _against(peer: str) -> Callable[[Lab], None]:
    """A part: whole engines, beside ``peer``."""
    make = PEERS[peer]
    return lambda lab: end_to_end.measure(lab, make.name, make)


def _saver(lab: Lab, facts: dict[str, object], path: Path | None) -> Callable[[], None]:
    """Writes all that is known by then; nothing without a path."""

    def save() -> None:
        if path is None:
            return
        now = {} if lab.is_dry else {"clocks at the end": clocks()}
        goals = {goal.name: goal.judge(lab) for goal in GOALS}
        report = {"machine": {**facts, **now}, **lab.as_json(), "goals": goals}
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    return save


def main(words: list[str]) -> int:
    """Command line; 1 if a goal was missed or a part not measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--dry-run", action="store_true", help="tiny and interpreted: no times")
    parser.add_argument("--only", action="append", choices=PARTS, help="parts to measure")
    parser.add_argument("--seconds", type=float, default=450.0, help="begin no part after these")
    parser.add_argument("--peer", choices=PEERS, help="whole engines alone, beside this one")
    parser.add_argument("--json", type=Path, help="default: in bench/results")
    arguments = parser.parse_args(words)
    parts = {name: PARTS[name] for name in arguments.only or PARTS}
    if arguments.peer:
        parts = {f"end-to-end beside {arguments.peer}": _against(arguments.peer)}
        try:
            check_installed(arguments.peer)
        except EngineError as error:
            print(error, file=sys.stderr)
            return 2
    if not arguments.dry_run and not torch.cuda.is_available():
        print("NO CUDA DEVICE HERE: nothing is measured (--dry-run runs without)", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.device("cpu") if arguments.dry_run else torch.device("cuda", 0)
    lab = Lab(device, TINY if arguments.dry_run else LLAMA_3_8B)
    path = arguments.json
    if path is None and not arguments.dry_run:
        beside = f"-{arguments.peer}" if arguments.peer else ""
        path = Path(f"bench/results/gpu{beside}.json")
    measure(lab, parts, arguments.seconds, _saver(lab, machine_facts(device), path))
    print("\n".join(table(lab)))
    is_missed = any(goal.judge(lab)[1] == "FAIL" for goal in GOALS)
    return 1 if is_missed or lab.skipped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
