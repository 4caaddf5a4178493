"""How many requests a second each system serves at the same latency.

Latency is the paper's *normalised latency*: from arrival to the last token, divided by the number
of output tokens, mean over requests. Over the rate it stays low until the queue begins to grow
without end; there the curve goes up steeply, and the rate at which it crosses a given latency
hardly depends on which latency is given. So the ratio of two systems is taken at several, and the
smallest ratio counts.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from bench.paper.cost_model import CostModel
from bench.paper.lengths import Lengths
from bench.paper.systems import PAGEFRAME, SYSTEMS, Serve
from bench.paper.workload import poisson

LATENCIES_S = (0.1, 0.2, 0.5)
"""Seconds per token at which rates are compared: some three to fifteen times that of a server at
rest. The paper's plots end at 1."""


@dataclass(frozen=True, slots=True)
class Point:
    """One run.

    Attributes:
        rate_per_s: Requests offered.
        latency_s_per_token: Mean normalised latency.
        num_running: Mean batch while requests came, over steps.
    """

    rate_per_s: float
    latency_s_per_token: float
    num_running: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Latency of one system over rates, ascending."""

    system: str
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, object]:
        """For the results file."""
        return asdict(self)


def measure_curve(
    system: str,
    lengths: Lengths,
    cost: CostModel,
    rates_per_s: Iterable[float],
    *,
    duration_s: float,
    seeds: Sequence[int],
    on_point: Callable[[], None],
) -> Curve:
    """Serve the same requests at each rate, until the latency is past all that are compared.

    Each seed is a trace of its own, so that no single burst of requests decides; points are means
    over traces.
    """
    serve: Serve = SYSTEMS[system]
    points: list[Point] = []
    for rate_per_s in rates_per_s:
        if not points or points[-1].latency_s_per_token < LATENCIES_S[-1]:
            latencies, batches = [], []
            for seed in seeds:
                workload = poisson(lengths, rate_per_s=rate_per_s, duration_s=duration_s, seed=seed)
                run = serve(workload, cost)
                latencies.append(run.mean_latency_s_per_token)
                batches.append(run.usage.between(0, workload.end_ns).mean("num_running"))
            points.append(Point(rate_per_s, fmean(latencies), fmean(batches)))
        on_point()
    return Curve(system, tuple(points))


def rate_at(points: Sequence[Point], latency_s_per_token: float) -> float:
    """The rate at which the curve first reaches a latency, the logarithm of which is interpolated.

    NaN if it does not within the curve.
    """
    for before, after in itertools.pairwise(points):
        low, high = before.latency_s_per_token, after.latency_s_per_token
        if low <= latency_s_per_token < high:
            part = math.log(latency_s_per_token / low) / math.log(high / low)
            return before.rate_per_s + part * (after.rate_per_s - before.rate_per_s)
    return math.nan


def smallest_ratio(curves: dict[str, Curve], baseline: str) -> float:
    """How many times the baseline's rate Pageframe serves, at the latency where it is least."""
    ratios = [
        rate_at(curves[PAGEFRAME].points, latency) / rate_at(curves[baseline].points, latency)
        for latency in LATENCIES_S
    ]
    # A curve that does not reach a latency leaves nothing to compare there, and that must show.
    return math.nan if any(map(math.isnan, ratios)) else min(ratios)
