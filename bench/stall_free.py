"""Long prompts beside running decodes: how late tokens come, with and without a target.

32 sequences decode, an 8B model on an H200 (``lab/simulate_cost.py`` says what that costs, and from
what). Prompts of 4,000 tokens arrive on top, four a second, and want 16 tokens each. Measured are
the times between two tokens of the 32, beside the time to the first token of the prompts.

    undisturbed     the 32 alone: its median step is the unit of everything else
    whole           a budget in which a prompt goes in one step
    512, 256        fixed budgets
    target          --target-itl-ms of twice the undisturbed step, budget as for ``whole``

The machine is steady, or it varies by 4 % from step to step and takes half as long again for some
seconds (``uneven``). Virtual time, the real scheduler and the real KV memory: ``make stall-free``.
"""

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.executor.batch import StepBatch
from pageframe.lab.simulate_arrivals import Arrival
from pageframe.lab.simulate_cost import H200_8B, DeviceCost
from pageframe.lab.virtual import VirtualConfig, VirtualRun, VirtualServer
from pageframe.scheduler.options import SchedulerOptions

matplotlib.use("Agg")

RESULTS = Path(__file__).parent / "results" / "stall_free"
NUM_DECODES = 32
DECODE_PROMPT_TOKENS = 1000
DECODE_OUTPUT_TOKENS = 2000
PROMPT_TOKENS = 4000
PROMPT_OUTPUT_TOKENS = 16
RATE_PER_S = 4.0
FIRST_PROMPT_S = 1.5
DURATION_S = 10.0
WHOLE_BUDGET = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class UnevenCost(DeviceCost):
    """Steps that vary, on a machine that is slow from one number of steps to another."""

    rng: random.Random = field(default_factory=lambda: random.Random(1))
    count: list[int] = field(default_factory=lambda: [0])
    slow: range = range(600, 900)

    def of(self, batch: StepBatch) -> int:
        self.count[0] += 1
        slowness = 1.5 if self.count[0] in self.slow else 1.0
        return round(DeviceCost.of(self, batch) * slowness * max(0.9, self.rng.gauss(1.0, 0.04)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to serve."""

    name: str
    machine: str
    itl_ms: NDArray[np.float64]
    ttft_ms: NDArray[np.float64]

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "machine": self.machine,
            "itl_ms": _percentiles(self.itl_ms),
            "ttft_ms": _percentiles(self.ttft_ms),
        }


def arrivals(*, with_prompts: bool) -> list[Arrival]:
    who = [
        Arrival(
            arrival_s=0.0,
            num_prompt_tokens=DECODE_PROMPT_TOKENS,
            num_output_tokens=DECODE_OUTPUT_TOKENS,
        )
        for _ in range(NUM_DECODES)
    ]
    rng = random.Random(0)
    at_s = FIRST_PROMPT_S
    while with_prompts and at_s < DURATION_S:
        who.append(
            Arrival(
                arrival_s=at_s,
                num_prompt_tokens=PROMPT_TOKENS,
                num_output_tokens=PROMPT_OUTPUT_TOKENS,
            )
        )
        at_s += rng.expovariate(RATE_PER_S)
    return who


def serve(name: str, *, cost: DeviceCost, budget: int, target_ns: int = 0) -> Row:
    options = SchedulerOptions(token_budget=budget, max_num_running=256, target_itl_ns=target_ns)
    config = VirtualConfig(cost=cost, options=options, num_blocks=H200_8B.num_blocks(16))
    with_prompts = name != "undisturbed"
    run = VirtualServer(config).serve(arrivals(with_prompts=with_prompts))
    machine = "uneven" if isinstance(cost, UnevenCost) else "steady"
    itl_ms, ttft_ms = _measure(run)
    return Row(name=name, machine=machine, itl_ms=itl_ms, ttft_ms=ttft_ms)


def _measure(run: VirtualRun) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times between tokens of the decodes while prompts come; times to first token of those."""
    ids, times = run.token_times()
    places = np.array([run.request_of[sequence_id] for sequence_id in ids.tolist()])
    is_first = np.diff(ids, prepend=-1) != 0
    gaps = np.diff(times, prepend=0)
    seconds = times / NANOSECONDS_PER_SECOND
    is_meant = (places < NUM_DECODES) & ~is_first
    is_meant &= (seconds > FIRST_PROMPT_S) & (seconds < DURATION_S)
    arrival_s = np.array([arrival.arrival_s for arrival in run.arrivals])
    prompts = is_first & (places >= NUM_DECODES)
    return gaps[is_meant] / 1e6, (seconds[prompts] - arrival_s[places[prompts]]) * 1e3


def study() -> tuple[float, list[Row]]:
    undisturbed = serve("undisturbed", cost=H200_8B, budget=512)
    step_ms = float(np.median(undisturbed.itl_ms))
    target_ns = round(2 * step_ms * 1e6)
    rows = [undisturbed]
    for make in (lambda: H200_8B, _uneven):
        rows.append(serve("whole", cost=make(), budget=WHOLE_BUDGET))
        rows += [serve(str(budget), cost=make(), budget=budget) for budget in (512, 256)]
        rows.append(serve("target", cost=make(), budget=WHOLE_BUDGET, target_ns=target_ns))
    return step_ms, rows


def _uneven() -> UnevenCost:
    names = ("name", "base_ns", "decode_ns", "context_ns", "prefill_ns", "pair_ns", "move_ns")
    return UnevenCost(**{name: getattr(H200_8B, name) for name in names})


def _percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    if not len(values):
        return {}
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return {"p50": p50, "p90": p90, "p99": p99, "max": float(values.max())}


def verdict(step_ms: float, rows: list[Row]) -> dict[str, bool]:
    by = {(row.name, row.machine): row for row in rows}

    def p99(name: str, machine: str = "steady") -> float:
        return float(np.percentile(by[name, machine].itl_ms, 99))

    return {
        "p99 with a target stays within twice the undisturbed step": p99("target") <= 2 * step_ms,
        "p99 without chunks exceeds ten times that step": p99("whole") > 10 * step_ms,
    }


def show(step_ms: float, rows: list[Row]) -> None:
    table = Table("budget", "machine", header_style="bold")
    for name in ("time between tokens p50", "p99", "max", "p99 / undisturbed", "TTFT p50", "p99"):
        table.add_column(name, justify="right")
    for row in rows:
        itl, ttft = _percentiles(row.itl_ms), _percentiles(row.ttft_ms)
        table.add_row(
            row.name,
            row.machine,
            *(f"{itl[key]:.1f} ms" for key in ("p50", "p99", "max")),
            f"{itl['p99'] / step_ms:.2f}",
            *(f"{ttft[key]:.0f} ms" if ttft else "" for key in ("p50", "p99")),
        )
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)


def draw(step_ms: float, rows: list[Row], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axes, machine in zip(panels, ("steady", "uneven"), strict=True):
        for row in rows:
            if row.machine == machine or row.name == "undisturbed":
                ordered = np.sort(row.itl_ms)
                axes.plot(ordered, 1 - np.arange(len(ordered)) / len(ordered), label=row.name)
        axes.axvline(2 * step_ms, color="black", linestyle="--", linewidth=0.8)
        axes.axhline(0.01, color="#bbbbbb", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("time between tokens [ms]")
        axes.set_title(f"{machine} machine; dashed: target")
    panels[0].set_ylabel("share that waits longer")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    step_ms, rows = study()
    show(step_ms, rows)
    found = verdict(step_ms, rows)
    for claim, holds in found.items():
        print(f"{'yes' if holds else 'NO'}: {claim}")
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(step_ms, rows, output.with_suffix(".png"))
    document = {
        "cost": {name: getattr(H200_8B, name) for name in ("name", "base_ns", "context_ns",
                 "prefill_ns", "pair_ns", "kv_bytes_per_token")},
        "undisturbed_step_ms": step_ms,
        "target_ms": 2 * step_ms,
        "rows": [row.to_json() for row in rows],
        "verdict": found,
    }  # fmt: skip
    output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    raise SystemExit(0 if all(found.values()) else 1)


if __name__ == "__main__":
    main()
