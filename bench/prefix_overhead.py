"""What the prefix cache costs in a step when nothing is ever found.

    python -m bench.prefix_overhead [--sequences 256] [--step-ms 5] [--output FILE]

Two engines decode the same number of sequences, all different, one with the prefix cache, one
without. They take turns of 32 steps. The difference is hashing and indexing of blocks that became
full. It is measured twice:

    in line    over a runner that takes no time: all that the cache costs
    beside     over one whose device computes for ``--step-ms`` beside Python, as a GPU does: what
               of it a step has to wait for

A step of 5 ms is what an 8B model takes on a current GPU. The share of it that has to be waited for
shall be below 1 %.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from pageframe.core.clock import ManualClock
from pageframe.core.plan import Announcement, StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import NullTraceSink
from pageframe.executor.batch import StepBatch, StepOutput
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.sim import SimConfig, SimRunner

BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192
NUM_STEPS_PER_TURN = 32
SHARE_MAX = 0.01


class BesideRunner(SimRunner):
    """Has a device that computes for a set time beside Python; waits for it as for a GPU."""

    device_ns = 0

    def execute(self, batch: StepBatch) -> StepOutput:
        """Launch, do what belongs to no step, wait."""
        end_ns = time.perf_counter_ns() + self.device_ns
        output = super().execute(batch)
        if self.device_ns:
            batch.meanwhile()
        while time.perf_counter_ns() < end_ns:
            pass
        return output


class Decoding:
    """An engine whose sequences all decode; their lengths are spread over a block."""

    def __init__(self, num_sequences: int, *, has_prefix_cache: bool) -> None:
        self._step = 0
        self.runner = BesideRunner(SimConfig(max_model_len=MAX_MODEL_LEN), ManualClock())
        self._engine = StepEngine(
            self.runner,
            num_blocks=num_sequences * 80,
            block_size=BLOCK_SIZE,
            max_num_sequences=num_sequences,
            max_step_tokens=8192,
            max_model_len=MAX_MODEL_LEN,
            trace=NullTraceSink(),
            clock=ManualClock(),
            has_prefix_cache=has_prefix_cache,
        )
        rng = np.random.default_rng(0)
        sampling = SamplingParams(max_tokens=4000, ignore_eos=True)
        for index in range(num_sequences):
            # Those before it take a token in each step meanwhile; a stride of 1 would put all of
            # them at the same place in their blocks.
            tokens = rng.integers(1, 30_000, 64 + 2 * index % BLOCK_SIZE).tolist()
            announcement = Announcement(
                sequence_id=index + 1,
                token_ids=tokens,
                num_prompt_tokens=len(tokens),
                sampling=sampling,
            )
            self._do(announcement)

    def _do(self, announcement: Announcement | None = None) -> None:
        self._step += 1
        plan = StepPlan(step=self._step, builds_on=self._step - 1)
        if announcement is not None:
            plan.announce.append(announcement)
            plan.may.add(announcement.sequence_id, 0, len(announcement.token_ids))
        assert not self._engine.step(plan).refusal

    def turn_us(self, device_ns: int) -> list[float]:
        """Microseconds of each step of one turn."""
        self.runner.device_ns = device_ns
        times = []
        for _ in range(NUM_STEPS_PER_TURN):
            start_ns = time.perf_counter_ns()
            self._do()
            times.append((time.perf_counter_ns() - start_ns) / 1e3)
        return times


def _compare(
    engines: dict[str, Decoding], chosen: argparse.Namespace, way: str, device_ns: int
) -> dict[str, float]:
    turns: dict[str, list[list[float]]] = {name: [] for name in engines}
    for _ in track(range(chosen.turns), way, console=Console(stderr=True)):
        for name, engine in engines.items():
            turns[name].append(engine.turn_us(device_ns))
    means = {name: [statistics.fmean(turn) for turn in of] for name, of in turns.items()}
    extra_us = statistics.median(
        b - a for a, b in zip(means["without"], means["with"], strict=True)
    )
    # Where others use the machine too, the quickest steps are nearer to the truth.
    quick = {
        name: statistics.quantiles(chain.from_iterable(of), n=20)[0] for name, of in turns.items()
    }
    return {
        "engine_us_without": round(statistics.median(means["without"]), 1),
        "engine_us_with": round(statistics.median(means["with"]), 1),
        "extra_us_per_step": round(extra_us, 1),
        "extra_us_per_full_block": round(extra_us / (chosen.sequences / BLOCK_SIZE), 2),
        "share_of_step": round(extra_us / 1e3 / chosen.step_ms, 4),
        "extra_us_of_quick_steps": round(quick["with"] - quick["without"], 1),
    }


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description="Cost of the prefix cache at no hits.")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--turns", type=int, default=14)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    chosen = parser.parse_args()
    engines = {
        name: Decoding(chosen.sequences, has_prefix_cache=name == "with")
        for name in ("without", "with")
    }
    figures: dict[str, Any] = {"num_sequences": chosen.sequences, "step_ms": chosen.step_ms}
    for way, device_ns in (("in_line", 0), ("beside", int(chosen.step_ms * 1e6))):
        figures[way] = _compare(engines, chosen, way, device_ns)
    figures["pass"] = figures["beside"]["share_of_step"] < SHARE_MAX
    document = json.dumps(figures, indent=2)
    print(document)
    if chosen.output is not None:
        chosen.output.write_text(document + "\n", encoding="utf-8")
    return 0 if figures["pass"] else 1


if __name__ == "__main__":
    sys.exit(main())
