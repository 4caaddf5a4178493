"""Simulated policies side by side, for people and for machines."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pageframe.lab.simulate import Outcome
from pageframe.lab.simulate_figures import Figures, Objectives, Spread

Row = tuple[str, Callable[[Figures], str]]

_PIPE_WIDTH = 160


def print_outcomes(outcomes: Sequence[Outcome], objectives: Objectives) -> None:
    """One column for each policy."""
    table = Table(title=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.policy.name, justify="right", overflow="fold")
    for label, show in _ROWS:
        table.add_row(label, *(show(outcome.figures) for outcome in outcomes))
    table.add_row("requests simulated per second", *map(_simulated_per_s, outcomes))
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    console = Console(highlight=False, markup=False, width=width)
    console.print(table)
    console.print(
        f"good: first token within {_time(objectives.ttft_s)}, "
        f"99 % of the times between tokens within {_time(objectives.itl_s)}",
        style="dim",
    )


def outcomes_to_json(outcomes: Sequence[Outcome], objectives: Objectives) -> str:
    """One JSON object, times in seconds."""
    document: dict[str, Any] = {
        "objectives": {"ttft_s": objectives.ttft_s, "itl_s": objectives.itl_s},
        "policies": [
            {
                "name": outcome.policy.name,
                "settings": dict(outcome.policy.settings),
                "refused": dict(outcome.run.refused),
                "wall_s": outcome.wall_s,
                **outcome.figures.to_json(),
            }
            for outcome in outcomes
        ],
    }
    return json.dumps(document)


def _spread(show: Callable[[Figures], Spread]) -> Callable[[Figures], str]:
    def text(figures: Figures) -> str:
        spread = show(figures)
        return " / ".join(map(_time, (spread.p50, spread.p90, spread.p99)))

    return text


_ROWS: list[Row] = [
    ("requests", lambda f: str(f.num_requests)),
    ("finished / good", lambda f: f"{f.num_finished} / {f.num_good}"),
    ("refused / failed", lambda f: f"{f.num_refused} / {f.num_failed}"),
    ("goodput [requests/s]", lambda f: f"{f.goodput_per_s:.2f}"),
    ("output [tokens/s]", lambda f: f"{f.output_tokens_per_s:.0f}"),
    ("time to first token p50 / p90 / p99", _spread(lambda f: f.ttft_s)),
    ("time between tokens p50 / p90 / p99", _spread(lambda f: f.itl_s)),
    ("longest time between tokens", lambda f: _time(f.itl_s.max)),
    ("latency p50 / p90 / p99", _spread(lambda f: f.latency_s)),
    ("preemptions", lambda f: str(f.num_preemptions)),
    ("tokens computed again", lambda f: f"{f.recomputed_share:.1%}"),
    ("prompt tokens found", lambda f: f"{f.cached_share:.1%}"),
    ("blocks held mean / peak", lambda f: f"{f.mean_blocks_share:.0%} / {f.peak_blocks_share:.0%}"),
    ("sequences in a step", lambda f: f"{f.mean_running:.1f}"),
    ("steps", lambda f: str(f.num_steps)),
    ("simulated time", lambda f: _time(f.duration_s)),
]


def _simulated_per_s(outcome: Outcome) -> str:
    return f"{outcome.figures.num_requests / max(outcome.wall_s, 1e-9):.0f}"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.2f} s"
