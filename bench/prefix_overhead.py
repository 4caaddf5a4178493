"""What the prefix cache costs in a step when nothing is ever found.

    python -m bench.prefix_overhead [--sequences 256] [--step-ms 5] [--output FILE]

Two engines decode the same number of sequences, all different, over a runner that takes no time:
one with the prefix cache, one without. They take turns of 32 steps. The difference is hashing and
indexing of blocks that became full; it is compared with a step of ``--step-ms``, by default 5 ms,
what an 8B model takes for one on a current GPU.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from pageframe.core.clock import ManualClock
from pageframe.core.plan import Announcement, StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import NullTraceSink
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.sim import SimConfig, SimRunner

BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192
NUM_STEPS_PER_TURN = 32
SHARE_MAX = 0.01


class Decoding:
    """An engine whose sequences all decode; their lengths are spread over a block."""

    def __init__(self, num_sequences: int, *, has_prefix_cache: bool) -> None:
        self._step = 0
        self._engine = StepEngine(
            SimRunner(SimConfig(max_model_len=MAX_MODEL_LEN), ManualClock()),
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

    def turn_us(self) -> float:
        """Microseconds per step over one turn."""
        start_ns = time.perf_counter_ns()
        for _ in range(NUM_STEPS_PER_TURN):
            self._do()
        return (time.perf_counter_ns() - start_ns) / 1e3 / NUM_STEPS_PER_TURN


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description="Cost of the prefix cache at no hits.")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    chosen = parser.parse_args()
    without, with_cache = (
        Decoding(chosen.sequences, has_prefix_cache=has_cache) for has_cache in (False, True)
    )
    times: dict[str, list[float]] = {"without": [], "with": []}
    for _ in track(range(chosen.turns), "turns", console=Console(stderr=True)):
        times["without"].append(without.turn_us())
        times["with"].append(with_cache.turn_us())
    differences = [b - a for a, b in zip(times["without"], times["with"], strict=True)]
    extra_us = statistics.median(differences)
    figures = {
        "num_sequences": chosen.sequences,
        "step_ms": chosen.step_ms,
        "engine_us_without": round(statistics.median(times["without"]), 1),
        "engine_us_with": round(statistics.median(times["with"]), 1),
        "extra_us_per_step": round(extra_us, 1),
        "extra_us_per_full_block": round(extra_us / (chosen.sequences / BLOCK_SIZE), 2),
        "share_of_step": round(extra_us / 1e3 / chosen.step_ms, 4),
    }
    figures["pass"] = figures["share_of_step"] < SHARE_MAX
    document = json.dumps(figures, indent=2)
    print(document)
    if chosen.output is not None:
        chosen.output.write_text(document + "\n", encoding="utf-8")
    return 0 if figures["pass"] else 1


if __name__ == "__main__":
    sys.exit(main())
