"""Time of one step on a CPU: the compiled kernels beside PyTorch, by phase.

    python -m bench.cpu_step --threads 1 --out steps.json

Both ways compute the same steps in turns within one process, so that what the machine loses to
others it takes from both; the best of all repetitions counts. With one thread, time is that of the
thread and not of the clock on the wall, which others cannot stretch as much.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pageframe.executor.batch import StepBatch
from pageframe.executor.model.fused import FusedDecoder
from pageframe.executor.model.loader import load_runner
from pageframe.executor.model.runner import PagedRunner
from pageframe.kernels.cpu.model import PHASES

_BLOCK_SIZE = 16
_SEED = 20241121
_NUM_PHASE_STEPS = 5
# Twice in a row, a small number in float32 as in bfloat16.
_WRITTEN_BYTE = 0x3C


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sequences of one step: how many, how long, and how many of their tokens are new."""

    num_sequences: int
    context_len: int
    num_new: int

    @property
    def num_blocks(self) -> int:
        """Blocks of each sequence."""
        return -(-self.context_len // _BLOCK_SIZE)

    @property
    def name(self) -> str:
        """As it stands in tables."""
        kind = "decode" if self.num_new == 1 else "prefill"
        return f"{kind} {self.num_sequences} x {self.context_len}"


CASES = (
    Case(num_sequences=1, context_len=256, num_new=1),
    Case(num_sequences=1, context_len=2048, num_new=1),
    Case(num_sequences=16, context_len=256, num_new=1),
    Case(num_sequences=64, context_len=256, num_new=1),
    Case(num_sequences=16, context_len=2048, num_new=1),
    Case(num_sequences=1, context_len=1024, num_new=1024),
)


def make_batch(case: Case, vocab_size: int) -> StepBatch:
    """A step of ``case`` with random tokens; sequences have blocks of their own, in order."""
    num_blocks = case.num_blocks
    tables = np.arange(case.num_sequences * num_blocks, dtype=np.int32).reshape(-1, num_blocks)
    positions = np.arange(case.context_len - case.num_new, case.context_len, dtype=np.int32)
    slots = tables[:, positions // _BLOCK_SIZE].astype(np.int64) * _BLOCK_SIZE
    slots += positions % _BLOCK_SIZE
    each = np.arange(case.num_sequences, dtype=np.int32)
    rng = np.random.default_rng(_SEED)
    return StepBatch(
        step=0,
        num_decodes=case.num_sequences if case.num_new == 1 else 0,
        rows=each,
        token_ids=rng.integers(0, vocab_size, slots.size).astype(np.int32),
        positions=np.tile(positions, case.num_sequences),
        slots=slots.reshape(-1),
        query_start=np.arange(case.num_sequences + 1, dtype=np.int32) * case.num_new,
        context_lens=np.full(case.num_sequences, case.context_len, np.int32),
        block_tables=tables,
        samples=each,
        sample_rows=each,
    )


class Engine:
    """One way to compute: a loaded model with a pool."""

    def __init__(self, model: str, kernels: str, dtype: str, kv_dtype: str, threads: int) -> None:
        runner = load_runner(
            model, cpu_kernels=kernels, dtype=dtype, kv_dtype=kv_dtype, num_threads=threads
        )
        assert isinstance(runner, PagedRunner), runner
        self.name = f"{runner.facts.kernels} {runner.facts.dtype} kv {runner.facts.kv_dtype}"
        self.vocab_size = runner.facts.vocab_size
        most = max(case.num_sequences * case.num_blocks for case in CASES)
        runner.allocate_pool(most, _BLOCK_SIZE)
        self.decoder, self._kv = runner._parts()
        # Memory that nobody has written is one page for all, which no cache ever misses.
        self._kv.arena.blocks.fill_(_WRITTEN_BYTE)

    def step(self, batch: StepBatch) -> None:
        """Everything from tokens to logits."""
        with torch.inference_mode():
            self._kv.begin_step(batch)
            outputs = self.decoder.forward(
                self._kv,
                torch.from_numpy(batch.token_ids.astype(np.int64)),
                torch.from_numpy(batch.positions.astype(np.int64)),
                torch.from_numpy(batch.sample_tokens),
            )
            self.decoder.logits(outputs)


def measure(
    engines: list[Engine], case: Case, seconds: float, clock_ns: Callable[[], int]
) -> dict[str, float]:
    """Best milliseconds of each engine, in turns."""
    batch = make_batch(case, engines[0].vocab_size)
    best = {engine.name: float("inf") for engine in engines}
    deadline_ns = time.monotonic_ns() + round(seconds * 1e9)
    while time.monotonic_ns() < deadline_ns:
        for engine in engines:
            started_ns = clock_ns()
            engine.step(batch)
            best[engine.name] = min(best[engine.name], (clock_ns() - started_ns) / 1e6)
    return best


def phases(engine: Engine, case: Case) -> dict[str, float]:
    """Milliseconds of each phase, the best of some steps; empty where nothing counts them."""
    if not isinstance(engine.decoder, FusedDecoder):
        return {}
    model, batch = engine.decoder.model, make_batch(case, engine.vocab_size)
    best = np.full(len(PHASES), np.iinfo(np.int64).max)
    for _ in range(_NUM_PHASE_STEPS):
        model.measure()
        engine.step(batch)
        assert model.phase_ns is not None
        best = np.minimum(best, model.phase_ns)
    model.phase_ns = None
    return dict(zip(PHASES, (best / 1e6).round(3).tolist(), strict=True))


def main() -> None:
    """Print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each case")
    parser.add_argument("--engines", default="torch:float32,auto:float32,auto:bfloat16")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    engines = [
        Engine(options.model, kernels, dtype, options.kv_dtype, options.threads)
        for kernels, dtype in (entry.split(":") for entry in options.engines.split(","))
    ]
    clock_ns = time.thread_time_ns if options.threads == 1 else time.perf_counter_ns
    rows = []
    for case in CASES:
        best = measure(engines, case, options.seconds, clock_ns)
        row = asdict(case) | {
            "milliseconds": best,
            "phases": {engine.name: phases(engine, case) for engine in engines},
        }
        rows.append(row)
        print(case.name, *(f"  {name}: {ms:.2f} ms" for name, ms in best.items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"threads": options.threads, "cases": rows}, indent=1))


if __name__ == "__main__":
    main()
