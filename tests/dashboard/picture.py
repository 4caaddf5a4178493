"""Draws what was seen in the layout of the dashboard's file: places, titles, units and legends."""

import io
import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from dashboard.grafana import GRID_COLUMNS, Panel
from dashboard.watched import SCRAPE_S, Answer, Watched

NOTE = (
    "Drawn from docs/grafana/pageframe.json with Prometheus's answers, not by Grafana:"
    " {seconds:.0f} s of four tenants, a tiny model on a CPU"
)
_DPI = 130
_WIDTH_IN = 9.6
# A grid unit of Grafana is 30 pixels high; in this picture a little less, so that it gets shorter.
_UNIT_HEIGHT_IN = 0.235
_NOTE_UNITS = 1.2
_COLOURS = (
    *("#2a6f97", "#e07a1f", "#3d9970", "#b5446e", "#7d5ba6", "#c9a227"),
    *("#5c6b73", "#4bb3c4", "#8c564b", "#a3b18a", "#d62839", "#1d3557"),
)
_PAPER, _SHEET, _EDGE, _GRID, _INK = "#f4f5f7", "#ffffff", "#d8dbe0", "#e9ebee", "#24292f"
# Room around the axes of a panel.
_BEFORE_IN, _AFTER_IN, _ABOVE_IN, _BELOW_IN, _LEGEND_ROW_IN = 0.72, 0.16, 0.36, 0.26, 0.15
_LEGEND_EDGE_IN, _LEGEND_MARK_IN, _LETTER_IN = 0.14, 0.34, 0.054


def seconds_text(value: float) -> str:
    """A duration in the unit that suits it."""
    for size, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return "0 s" if value == 0 else f"{value / 1e-9:.3g} ns"


def short_text(value: float) -> str:
    """A number in thousands or millions where that is shorter."""
    for size, name in ((1e6, " Mil"), (1e3, " K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"


UNITS = {
    "s": seconds_text,
    "short": short_text,
    "percentunit": lambda value: f"{100 * value:.3g}%",
    "reqps": lambda value: f"{short_text(value)} req/s",
    "ops": lambda value: f"{short_text(value)} ops/s",
}
"""Text of a value by Grafana's name of its unit."""


def draw(watched: Watched, file: Path) -> list[str]:
    """Write the picture as PNG; returns every text that is in it.

    Raises:
        KeyError: a panel has a unit that is not in ``UNITS``.
    """
    num_units = max(panel.top + panel.height for panel in watched.panels) + _NOTE_UNITS
    size_in = (_WIDTH_IN, num_units * _UNIT_HEIGHT_IN)
    figure = plt.figure(figsize=size_in, dpi=_DPI, facecolor=_PAPER)
    note = NOTE.format(seconds=watched.end_s - watched.begin_s)
    _write(figure, 0.1, size_in[1] - 0.6 * _UNIT_HEIGHT_IN, note, 8)
    for number, panel in enumerate(watched.panels):
        corner_in = (
            panel.left / GRID_COLUMNS * _WIDTH_IN,
            (num_units - _NOTE_UNITS - panel.top - panel.height) * _UNIT_HEIGHT_IN,
        )
        if panel.is_heading:
            _write(figure, 0.1, corner_in[1] + _UNIT_HEIGHT_IN / 2, f"▾ {panel.title}", 10)
        else:
            _draw_panel(figure, corner_in, panel, watched, watched.answers[number])
    texts = [text.get_text() for text in figure.findobj(Text)]
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", facecolor=_PAPER)
    plt.close(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(drawn) as picture:
        # Half the bytes; of Pillow's methods the one that keeps the colours of thin lines apart.
        few = picture.convert("RGB").quantize(method=Image.Quantize.FASTOCTREE)
        few.save(file, optimize=True)
    return texts


def draw_top(whole: Path, panels: list[Panel], below: str, file: Path) -> None:
    """Write what of a picture is above the heading ``below``: a first page has room for that."""
    (top,) = [panel.top for panel in panels if panel.is_heading and panel.title == below]
    height = round((_NOTE_UNITS + top) * _UNIT_HEIGHT_IN * _DPI)
    with Image.open(whole) as picture:
        picture.crop((0, 0, picture.width, height)).save(file, optimize=True)


def _draw_panel(
    figure: Figure,
    corner_in: tuple[float, float],
    panel: Panel,
    watched: Watched,
    answers: list[Answer],
) -> None:
    """A white sheet with a title, and on it axes, lines and a legend."""
    left_in, bottom_in = corner_in
    width_in = panel.width / GRID_COLUMNS * _WIDTH_IN
    height_in = panel.height * _UNIT_HEIGHT_IN
    sheet = _fraction(figure, left_in + 0.04, bottom_in + 0.04, width_in - 0.08, height_in - 0.08)
    figure.add_artist(
        FancyBboxPatch(
            sheet[:2],
            *sheet[2:],
            boxstyle="square,pad=0",
            facecolor=_SHEET,
            edgecolor=_EDGE,
            linewidth=0.8,
            transform=figure.transFigure,
            zorder=-1,
        )
    )
    _write(figure, left_in + 0.14, bottom_in + height_in - 0.19, panel.title, 8.5)
    span_s = watched.end_s - watched.begin_s
    at_s = np.arange(math.floor(span_s / SCRAPE_S) + 1) * float(SCRAPE_S)
    lines = list(_lines(answers, watched.begin_s, at_s))
    rows = list(_legend_rows([name for name, _ in lines], width_in - 2 * _LEGEND_EDGE_IN))
    below_in = _BELOW_IN + _LEGEND_ROW_IN * len(rows)
    axes = figure.add_axes(
        _fraction(
            figure,
            left_in + _BEFORE_IN,
            bottom_in + below_in,
            width_in - _BEFORE_IN - _AFTER_IN,
            height_in - below_in - _ABOVE_IN,
        ),
        facecolor="none",
    )
    _draw_lines(axes, panel, lines, at_s)
    axes.set_xlim(0, span_s)
    for number, row in enumerate(reversed(rows)):
        middle_in = bottom_in + 0.12 + number * _LEGEND_ROW_IN
        _draw_legend_row(figure, left_in + _LEGEND_EDGE_IN, middle_in, row)


def _legend_rows(names: list[str], room_in: float) -> Iterator[list[tuple[int, str]]]:
    """Places and names of series, as many in a row as fit."""
    row: list[tuple[int, str]] = []
    taken_in = 0.0
    for place, name in enumerate(names):
        if row and taken_in + _entry_in(name) > room_in:
            yield row
            row, taken_in = [], 0.0
        row.append((place, name))
        taken_in += _entry_in(name)
    yield row


def _entry_in(name: str) -> float:
    """Room that a name takes in a legend, its mark and the gap to the next one with it."""
    return _LEGEND_MARK_IN + len(name) * _LETTER_IN


def _draw_legend_row(
    figure: Figure, left_in: float, middle_in: float, row: list[tuple[int, str]]
) -> None:
    for place, name in row:
        begin, middle, width, _ = _fraction(figure, left_in, middle_in, 0.14, 0)
        colour = _COLOURS[place % len(_COLOURS)]
        mark = Line2D((begin, begin + width), (middle, middle), color=colour, linewidth=2)
        mark.set_transform(figure.transFigure)
        figure.add_artist(mark)
        _write(figure, left_in + 0.2, middle_in, name, 6.8)
        left_in += _entry_in(name)


def _draw_lines(
    axes: Axes, panel: Panel, lines: list[tuple[str, np.ndarray]], at_s: np.ndarray
) -> None:
    ground = np.zeros(len(at_s))
    for number, (_, values) in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        top = ground + np.nan_to_num(values) if panel.is_stacked else values
        axes.plot(at_s, top, color=colour, linewidth=1.0)
        if panel.opacity:
            axes.fill_between(at_s, ground, top, color=colour, alpha=panel.opacity, linewidth=0)
        if panel.is_stacked:
            ground = top
    unit_text = UNITS[panel.unit]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit_text(value)))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=6.8, length=0, labelcolor=_INK)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _lines(
    answers: list[Answer], begin_s: float, at_s: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of each series, one value for each of ``at_s``; not-a-number for none."""
    for answer in answers:
        for series in answer.series:
            values = np.full(len(at_s), np.nan)
            for point_s, value in series.points:
                place = round((point_s - begin_s) / SCRAPE_S)
                if 0 <= place < len(values):
                    values[place] = value
            yield answer.query.name_of(series.labels), values


def _write(figure: Figure, left_in: float, middle_in: float, text: str, size: float) -> None:
    place = _fraction(figure, left_in, middle_in, 0, 0)
    figure.text(*place[:2], text, fontsize=size, color=_INK, va="center")


def _fraction(
    figure: Figure, left_in: float, bottom_in: float, width_in: float, height_in: float
) -> tuple[float, float, float, float]:
    """A rectangle in shares of the figure, as matplotlib wants it."""
    wide_in, high_in = figure.get_size_inches()
    return left_in / wide_in, bottom_in / high_in, width_in / wide_in, height_in / high_in
