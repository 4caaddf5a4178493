"""The figures of the study, as PNG files."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.paper.occupancy import Occupancy
from bench.paper.published import BEAM_SAVINGS, PARALLEL_SAVINGS
from bench.paper.rates import LATENCIES_S
from bench.paper.sharing import Sharing
from bench.paper.study import Results
from bench.paper.sweeps import BeamWidthPoint, BlockSizePoint

_DPI = 120
_PARTS = (
    ("token_share", "token states", "#2a6f97"),
    ("future_share", "reservation", "#a9d6e5"),
    ("unused_share", "internal fragmentation", "#f4a261"),
    ("rest_share", "external fragmentation, free", "#d9d9d9"),
)
_NS_PER_MS = 1e6
# A share below this has no room for its number.
_SHARE_MIN_LABELLED = 5


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw every figure into ``folder``; returns the files."""
    matched = results.lengths[0].name
    figures = {
        "memory": _draw_memory(results.occupancy[matched]),
        "rates": _draw_rates(results),
        "sharing": _draw_sharing(results),
        "block_sizes": _draw_block_sizes(results.block_sizes),
        "beam_widths": _draw_beam_widths(results.beam_widths),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"paper_{name}.png")
        figure.savefig(paths[-1], dpi=_DPI, metadata={"Software": None})
        plt.close(figure)
    return paths


def _draw_memory(systems: list[Occupancy]) -> Figure:
    """As figure 2 of the paper: where KV memory goes."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    names = [occupancy.system for occupancy in systems]
    bottom = np.zeros(len(systems))
    for field, label, color in _PARTS:
        shares = np.array([100 * getattr(occupancy, field) for occupancy in systems])
        bars = axes.bar(names, shares, bottom=bottom, label=label, color=color)
        axes.bar_label(
            bars,
            [f"{share:.1f}" if share > _SHARE_MIN_LABELLED else "" for share in shares],
            label_type="center",
        )
        bottom += shares
    axes.set_ylabel("share of KV memory [%]")
    axes.set_ylim(0, 100)
    axes.set_title("Memory always full, ShareGPT, OPT-13B on an A100-40GB")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _draw_rates(results: Results) -> Figure:
    """As figure 12: latency over the request rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axes, curves, title in (
        (left, results.curves, "cost model"),
        (right, results.roofline_curves, "perfect device"),
    ):
        for name, curve in curves.items():
            rates = [point.rate_per_s for point in curve.points]
            latencies = [point.latency_s_per_token for point in curve.points]
            axes.plot(rates, latencies, marker=".", label=name)
        for latency in LATENCIES_S:
            axes.axhline(latency, color="#bbbbbb", linewidth=0.5)
        axes.set_yscale("log")
        axes.set_ylim(0.01, 2)
        axes.set_xlabel("requests per second")
        axes.set_title(f"ShareGPT, OPT-13B, {title}")
        axes.legend(fontsize="small")
    left.set_ylabel("normalised latency [s per token]")
    return figure


def _draw_sharing(results: Results) -> Figure:
    """As figure 15: blocks saved, for every set of lengths; bars across are the paper's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    names = [lengths.name for lengths in results.lengths]
    for axes, measured, paper, title in (
        (left, results.parallel, PARALLEL_SAVINGS, "parallel sampling"),
        (right, results.beams, BEAM_SAVINGS, "beam search"),
    ):
        _draw_bars(axes, measured, names, paper)
        axes.set_title(title)
        axes.set_xlabel("sequences of a request")
    left.set_ylabel("blocks saved [%]")
    left.legend(fontsize="small", loc="upper left")
    return figure


def _draw_bars(
    axes: Axes, measured: list[Sharing], names: list[str], paper: dict[str, dict[int, float]]
) -> None:
    numbers = sorted({sharing.num_sequences for sharing in measured})
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [sharing for sharing in measured if sharing.data == name]
        if not found:
            continue
        places = np.arange(len(numbers)) + (index - (len(names) - 1) / 2) * width
        shares = [100 * sharing.saved_share for sharing in found]
        bars = axes.bar(places, shares, width, label=name, color=f"C{index}")
        axes.bar_label(bars, fmt="%.1f", fontsize="x-small", label_type="center")
        published = paper["Alpaca" if name.startswith("Alpaca") else "ShareGPT"]
        for place, number in zip(places, numbers, strict=True):
            if number in published:
                level = 100 * published[number]
                axes.hlines(level, place - width / 2, place + width / 2, color="black")
    axes.set_xticks(range(len(numbers)), [str(number) for number in numbers])


def _draw_block_sizes(points: list[BlockSizePoint]) -> Figure:
    figure, panels = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    sizes = [point.block_size for point in points]
    width = points[0].sharing.num_sequences
    series = (
        ("waste in blocks given out [%]", [100 * point.wasted_share for point in points]),
        ("block tables [KiB]", [point.table_bytes / 1024 for point in points]),
        (
            f"copies of a full step, beams of {width} [ms]",
            [point.balance.copy_ns / _NS_PER_MS for point in points],
        ),
        (f"speed with sharing / without, beams of {width}", [p.balance.speedup for p in points]),
    )
    for axes, (label, values) in zip(panels, series, strict=True):
        axes.plot(sizes, values, marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("block size [tokens]")
        axes.set_title(label, fontsize="medium")
        axes.set_ylim(bottom=0)
    panels[-1].axhline(1, color="#bb3333", linewidth=0.8)
    figure.suptitle("ShareGPT, OPT-13B")
    return figure


def _draw_beam_widths(points: list[BeamWidthPoint]) -> Figure:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    widths = [point.width for point in points]
    left.plot(widths, [100 * point.sharing.saved_share for point in points], marker="o")
    left.plot(widths, [100 * (1 - 1 / width) for width in widths], linestyle=":", color="#888888")
    left.set_title("blocks saved [%], dotted: if all were shared", fontsize="medium")
    middle.plot(
        widths, [point.balance.copy_ns / _NS_PER_MS for point in points], marker="o", label="copies"
    )
    middle.plot(
        widths,
        [point.balance.break_even_copy_ns / _NS_PER_MS for point in points],
        marker="s",
        label="break even",
    )
    middle.plot(
        widths,
        [point.balance.history_copy_ns / _NS_PER_MS for point in points],
        marker="^",
        linestyle=":",
        label="histories, without sharing",
    )
    middle.set_yscale("log")
    middle.set_title("copies of a full step [ms]", fontsize="medium")
    middle.legend(fontsize="small")
    right.plot(widths, [point.balance.speedup for point in points], marker="o")
    right.axhline(1, color="#bb3333", linewidth=0.8)
    right.set_ylim(bottom=0)
    right.set_title("speed with sharing / without", fontsize="medium")
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("beam width")
    figure.suptitle("ShareGPT, OPT-13B, blocks of 16 tokens")
    return figure
