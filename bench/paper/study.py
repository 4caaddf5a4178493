"""Everything that is measured, in one go."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.paper.ancestry import Parents, read_recordings
from bench.paper.cost_model import ROOFLINE, SERVER, CostModel
from bench.paper.lengths import Lengths, alpaca_like, like_paper, sharegpt
from bench.paper.occupancy import Occupancy, measure_at_rate, measure_occupancy
from bench.paper.rates import Curve, measure_curve
from bench.paper.sharing import Sharing, measure_beams, measure_parallel
from bench.paper.sweeps import (
    BeamWidthPoint,
    BlockSizePoint,
    measure_beam_width,
    measure_block_size,
)
from bench.paper.systems import PAGEFRAME, SYSTEMS

NUM_SEQUENCES = (2, 4, 6)
"""Samples and beam widths of figure 15."""

_SEED = 2023
_NUM_ALPACA_REQUESTS = 20_000
_SWEEP_WIDTH = 4
# Requests a second at which the paper counts batches (figure 13).
_SHAREGPT_RATE_PER_S = 2.0
_ALPACA_RATE_PER_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long everything runs; less makes figures noisy, and nothing else."""

    num_backlog_requests: int = 1000
    rate_duration_s: float = 800.0
    roofline_duration_s: float = 300.0
    rate_seeds: tuple[int, ...] = (_SEED, _SEED + 1)
    sharegpt_duration_s: float = 600.0
    alpaca_duration_s: float = 120.0
    num_parallel_requests: int = 400
    num_beam_requests: int = 128
    # Alpaca's requests are a fifth as long, and with prompts of one or two blocks they are noisy.
    alpaca_factor: int = 4
    sweep_duration_s: float = 240.0
    num_sweep_requests: int = 48
    pageframe_rates_per_s: tuple[float, ...] = (1.5, 1.75, 2, 2.25, 2.5, 3, 4)
    roofline_rates_per_s: tuple[float, ...] = (3.5, 4, 4.5, 5, 6)
    orca_rates_per_s: tuple[float, ...] = tuple(np.arange(0.1, 4.0, 0.05).round(2).tolist())
    block_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    beam_widths: tuple[int, ...] = (2, 4, 6, 8, 16, 32, 64)

    def num_width_requests(self, width: int) -> int:
        """Requests in the sweep over widths: wide searches have more beams in each."""
        return max(self.num_sweep_requests // 8, 4 * self.num_sweep_requests // width)


@dataclass(slots=True, kw_only=True)
class Results:
    """What was found.

    Attributes:
        lengths: Each set of lengths.
        occupancy: By name of lengths, each system with a full memory.
        sharegpt_at_rate: Each system at the rate of the paper's figure 13a.
        alpaca_at_rate: Each system at the rate of the paper's figure 13b.
        curves: By system, on the server of ``cost_model``.
        roofline_curves: By system, on a perfect device.
        parallel: Parallel sampling.
        beams: Beam search.
        block_sizes: The sweep over block sizes.
        beam_widths: The sweep over beam widths.
    """

    lengths: list[Lengths] = field(default_factory=list)
    occupancy: dict[str, list[Occupancy]] = field(default_factory=dict)
    sharegpt_at_rate: list[Occupancy] = field(default_factory=list)
    alpaca_at_rate: list[Occupancy] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    roofline_curves: dict[str, Curve] = field(default_factory=dict)
    parallel: list[Sharing] = field(default_factory=list)
    beams: list[Sharing] = field(default_factory=list)
    block_sizes: list[BlockSizePoint] = field(default_factory=list)
    beam_widths: list[BeamWidthPoint] = field(default_factory=list)


class Study:
    """Runs all measurements, and shows how far it is.

    Args:
        effort: How long everything runs.
        progress: Where progress is shown.
    """

    def __init__(self, effort: Effort, progress: Progress) -> None:
        self._effort = effort
        self._progress = progress
        self._plain = sharegpt()
        self._matched = like_paper(self._plain, _SEED)
        self._alpaca = alpaca_like(_NUM_ALPACA_REQUESTS, _SEED)
        self._recordings = read_recordings()
        self._results = Results(lengths=[self._matched, self._plain, self._alpaca])

    def run(self) -> Results:
        """Measure everything."""
        self._measure_occupancy()
        self._measure_rates(self._results.curves, SERVER, "rates")
        self._measure_rates(self._results.roofline_curves, ROOFLINE, "rates, perfect device")
        self._measure_sharing()
        self._sweep_block_sizes()
        self._sweep_beam_widths()
        return self._results

    def _measure_occupancy(self) -> None:
        effort, results = self._effort, self._results
        with self._stage("memory", len(results.lengths) + 2) as advance:
            for lengths in results.lengths:
                results.occupancy[lengths.name] = measure_occupancy(
                    lengths,
                    SERVER,
                    num_requests=self._factor(lengths) * effort.num_backlog_requests,
                    seed=_SEED,
                )
                advance()
            results.sharegpt_at_rate = measure_at_rate(
                self._matched,
                SERVER,
                rate_per_s=_SHAREGPT_RATE_PER_S,
                duration_s=effort.sharegpt_duration_s,
                seed=_SEED,
            )
            advance()
            results.alpaca_at_rate = measure_at_rate(
                self._alpaca,
                SERVER,
                rate_per_s=_ALPACA_RATE_PER_S,
                duration_s=effort.alpaca_duration_s,
                seed=_SEED,
            )
            advance()

    def _measure_rates(self, curves: dict[str, Curve], cost: CostModel, title: str) -> None:
        effort = self._effort
        is_server = cost is SERVER
        ours = effort.pageframe_rates_per_s if is_server else effort.roofline_rates_per_s
        rates = dict.fromkeys(SYSTEMS, effort.orca_rates_per_s) | {PAGEFRAME: ours}
        with self._stage(title, sum(map(len, rates.values()))) as advance:
            for name, rates_per_s in rates.items():
                curves[name] = measure_curve(
                    name,
                    self._matched,
                    cost,
                    rates_per_s,
                    duration_s=effort.rate_duration_s if is_server else effort.roofline_duration_s,
                    seeds=effort.rate_seeds if is_server else effort.rate_seeds[:1],
                    on_point=advance,
                )

    def _measure_sharing(self) -> None:
        effort, results = self._effort, self._results
        with self._stage("sharing", 5 * len(NUM_SEQUENCES)) as advance:
            for lengths in results.lengths:
                for number in NUM_SEQUENCES:
                    sharing = measure_parallel(
                        lengths,
                        SERVER,
                        num_samples=number,
                        num_requests=self._factor(lengths) * effort.num_parallel_requests,
                        seed=_SEED,
                    )
                    results.parallel.append(sharing)
                    advance()
            for lengths in (self._matched, self._alpaca):
                for number in NUM_SEQUENCES:
                    sharing = measure_beams(
                        lengths,
                        SERVER,
                        self._recordings[number],
                        num_requests=self._factor(lengths) * effort.num_beam_requests,
                        seed=_SEED,
                    )
                    results.beams.append(sharing)
                    advance()

    def _sweep_block_sizes(self) -> None:
        effort = self._effort
        recording: Parents = self._recordings[_SWEEP_WIDTH]
        with self._stage("block sizes", len(effort.block_sizes)) as advance:
            for block_size in effort.block_sizes:
                point = measure_block_size(
                    block_size,
                    self._matched,
                    SERVER,
                    recording,
                    duration_s=effort.sweep_duration_s,
                    num_beam_requests=effort.num_sweep_requests,
                    seed=_SEED,
                )
                self._results.block_sizes.append(point)
                advance()

    def _sweep_beam_widths(self) -> None:
        effort = self._effort
        with self._stage("beam widths", len(effort.beam_widths)) as advance:
            for width in effort.beam_widths:
                point = measure_beam_width(
                    self._recordings[width],
                    self._matched,
                    SERVER,
                    num_requests=effort.num_width_requests(width),
                    seed=_SEED,
                )
                self._results.beam_widths.append(point)
                advance()

    def _factor(self, lengths: Lengths) -> int:
        return self._effort.alpaca_factor if lengths is self._alpaca else 1

    @contextmanager
    def _stage(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        task = self._progress.add_task(title, total=total)
        yield lambda: self._progress.advance(task)
        # A curve that ends early leaves the rest of its points out.
        self._progress.update(task, completed=total)


def run_study(effort: Effort) -> Results:
    """Measure everything, with progress on standard error's terminal if there is one."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        return Study(effort, progress).run()
