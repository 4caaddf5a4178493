"""Draws exported spans as Jaeger does: a row each, a bar where its time was. SVG, by hand.

What Jaeger would show in a hundred rows is drawn in one where nothing is lost by it: operations
of a kind under one parent are marks in one row, and many chunks in a row are one row of bars.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pageframe.core.units import NANOSECONDS_PER_MILLISECOND
from pageframe.telemetry import spans as names
from pageframe.telemetry.reader import Span

_WIDTH, _MARGIN = 1180, 16
_LABEL_WIDTH, _DURATION_WIDTH = 250, 92
_ROW_HEIGHT, _BAR_HEIGHT = 21, 12
_TITLE_HEIGHT, _AXIS_HEIGHT, _LEGEND_HEIGHT = 34, 24, 30
_CHARACTER_WIDTH = 6.1
_NUM_ALIKE_MAX = 4
_NUM_TICKS_WANTED = 8
_MS_SHOWN_MAX = 2_000

_COLOURS = {
    names.SERVICE_GATEWAY: "#5b8def",
    names.SERVICE_SCHEDULER: "#e0a13c",
    names.SERVICE_EXECUTOR: "#3f9d6b",
}
_STALL_COLOUR, _PROVOKED_COLOUR = "#dba0a0", "#c8342f"
_KV = "kv."


@dataclass(frozen=True, slots=True)
class Panel:
    """One trace of a picture.

    Attributes:
        heading: Says whose it is.
        spans: Of the trace.
    """

    heading: str
    spans: Sequence[Span]


@dataclass(frozen=True, slots=True)
class Row:
    """Spans that are drawn side by side.

    Attributes:
        depth: How deep in the tree.
        spans: One, or several that are alike; in order of time.
    """

    depth: int
    spans: tuple[Span, ...]

    @property
    def is_operations(self) -> bool:
        """Whether these are operations on blocks, which take no time worth a bar."""
        return self.spans[0].name.startswith(_KV)

    @property
    def label(self) -> str:
        """For example ``prefill ×94``."""
        name, count = self.spans[0].name, len(self.spans)
        return f"{name} ×{count}" if count > 1 else name

    @property
    def duration_ms(self) -> float:
        """From the first one's start to the last one's end."""
        end_ns = max(span.end_ns for span in self.spans)
        return (end_ns - self.spans[0].start_ns) / NANOSECONDS_PER_MILLISECOND


def rows_of(spans: Sequence[Span]) -> list[Row]:
    """All spans of a trace, from the roots down, in rows."""
    known = {span.span_id for span in spans}
    children: dict[int, list[Span]] = {}
    for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)):
        children.setdefault(span.parent_span_id if span.parent_span_id in known else 0, []).append(
            span
        )

    def walk(level: Sequence[Span], depth: int) -> Iterator[Row]:
        for group in _groups(level):
            yield Row(depth, tuple(group))
            below = [child for span in group for child in children.get(span.span_id, ())]
            yield from walk(below, depth + 1)

    return list(walk(children.get(0, ()), 0))


def _groups(level: Sequence[Span]) -> list[list[Span]]:
    """Siblings that share a row: operations of a name, and runs of more than a few alike."""
    operations: dict[str, list[Span]] = {}
    runs: list[list[Span]] = []
    for span in level:
        if span.name.startswith(_KV):
            operations.setdefault(span.name, []).append(span)
        elif runs and runs[-1][0].name == span.name and names.STALL_CAUSE not in span.attributes:
            runs[-1].append(span)
        else:
            runs.append([span])
    groups = []
    for run in runs:
        groups += [run] if len(run) > _NUM_ALIKE_MAX else [[span] for span in run]
    return [*groups, *operations.values()]


def draw(title: str, panels: Sequence[Panel], provoked: Sequence[Span]) -> str:
    """An SVG of all panels over one axis of time.

    Args:
        title: Stands above.
        panels: Each with at least one span.
        provoked: Stalls that the picture is about; drawn in another colour.
    """
    drawn = [span for panel in panels for span in panel.spans]
    picture = _Picture(drawn, {(span.trace_id, span.span_id) for span in provoked})
    picture.text(_MARGIN, 22, title, weight="bold", size=14)
    picture.y = _TITLE_HEIGHT
    for panel in panels:
        picture.panel(panel)
    picture.legend()
    return picture.svg()


class _Picture:
    def __init__(self, spans: Sequence[Span], provoked: set[tuple[bytes, int]]) -> None:
        self._start_ns = min(span.start_ns for span in spans)
        self._time_ns = max(1, max(span.end_ns for span in spans) - self._start_ns)
        self._names = {
            (span.trace_id, span.span_id): str(span.attributes.get(names.REQUEST_ID, ""))
            for span in spans
            if span.name == names.SEQUENCE
        }
        self._provoked = provoked
        self._parts: list[str] = []
        self._left = _MARGIN + _LABEL_WIDTH
        self._right = _WIDTH - _MARGIN - _DURATION_WIDTH
        self.y = 0

    def panel(self, panel: Panel) -> None:
        rows = rows_of(panel.spans)
        self.text(_MARGIN, self.y + 16, panel.heading, weight="bold")
        bottom = self.y + _AXIS_HEIGHT + len(rows) * _ROW_HEIGHT
        self._axis(self.y + 16, bottom)
        self.y += _AXIS_HEIGHT
        for index, row in enumerate(rows):
            if index % 2 == 0:
                self._box(_MARGIN, self.y, _WIDTH - 2 * _MARGIN, _ROW_HEIGHT, "#00000008")
            self._row(row)
            self.y += _ROW_HEIGHT
        self.y += 10

    def legend(self) -> None:
        entries = [*_COLOURS.items(), ("other stalls", _STALL_COLOUR)]
        entries.append(("the stall", _PROVOKED_COLOUR))
        x = float(_MARGIN)
        for name, colour in entries:
            self._box(x, self.y + 6, 12, 12, colour)
            self.text(x + 18, self.y + 16, name, colour="#555")
            x += 40 + len(name) * _CHARACTER_WIDTH
        self.text(x, self.y + 16, "a mark is an operation on blocks", colour="#555")
        self.y += _LEGEND_HEIGHT

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {self.y}" '
            f'width="{_WIDTH}" height="{self.y}" font-family="ui-monospace, Menlo, Consolas, '
            f'DejaVu Sans Mono, monospace" font-size="11">'
        )
        background = f'<rect width="{_WIDTH}" height="{self.y}" fill="#ffffff"/>'
        return "\n".join([head, background, *self._parts, "</svg>"]) + "\n"

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        colour: str = "#222",
        weight: str = "normal",
        size: int = 11,
        anchor: str = "start",
    ) -> None:
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-weight="{weight}" '
            f'font-size="{size}" text-anchor="{anchor}">{html.escape(text)}</text>'
        )

    def _axis(self, y: float, bottom: float) -> None:
        total_ms = self._time_ns / NANOSECONDS_PER_MILLISECOND
        step_ms = _round_step(total_ms / _NUM_TICKS_WANTED)
        for tick in range(int(total_ms / step_ms) + 1):
            x = self._x(self._start_ns + round(tick * step_ms * NANOSECONDS_PER_MILLISECOND))
            self._parts.append(
                f'<line x1="{x:.1f}" y1="{y + 5:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" '
                'stroke="#00000018"/>'
            )
            self.text(x, y, _time_text(tick * step_ms), colour="#777", anchor="middle")

    def _row(self, row: Row) -> None:
        baseline = self.y + 15
        self.text(_MARGIN + 4 + 14 * row.depth, baseline, row.label)
        for span in row.spans:
            self._span(row, span)
        if row.is_operations:
            return
        end = _WIDTH - _MARGIN - 4
        self.text(end, baseline, f"{row.duration_ms:,.1f} ms", colour="#555", anchor="end")
        self._facts(row, baseline)

    def _span(self, row: Row, span: Span) -> None:
        x = self._x(span.start_ns)
        colour = _COLOURS.get(span.service, "#999")
        top = self.y + (_ROW_HEIGHT - _BAR_HEIGHT) / 2
        if row.is_operations:
            self._box(x - 0.6, top, 1.2, _BAR_HEIGHT, colour)
            return
        if span.name == names.STALL:
            colour = _PROVOKED_COLOUR if self._is_provoked(span) else _STALL_COLOUR
        self._box(x, top, max(1.5, self._x(span.end_ns) - x), _BAR_HEIGHT, colour)

    def _is_provoked(self, span: Span) -> bool:
        return (span.trace_id, span.span_id) in self._provoked

    def _facts(self, row: Row, baseline: float) -> None:
        """Beside the bar where there is room, else on it."""
        facts = self._facts_of(row)
        width = len(facts) * _CHARACTER_WIDTH + 8
        start = self._x(row.spans[0].start_ns)
        end = max(self._x(span.end_ns) for span in row.spans)
        if end + width <= self._right:
            self.text(end + 6, baseline, facts, colour="#444")
        elif start - width >= self._left:
            self.text(start - 6, baseline, facts, colour="#444", anchor="end")
        else:
            colour = "#fff" if self._is_provoked(row.spans[0]) else "#000"
            self.text(start + 6, baseline - 0.5, facts, colour=colour)

    def _facts_of(self, row: Row) -> str:
        span, attributes = row.spans[0], row.spans[0].attributes
        facts = []
        if span.name == names.GENERATE:
            facts.append(f"{attributes[names.TENANT]}'s request")
        if names.TOKENS_BEGIN in attributes:
            last = row.spans[-1].attributes[names.TOKENS_END]
            facts.append(f"tokens [{attributes[names.TOKENS_BEGIN]}, {last})")
        if names.STALL_CAUSE in attributes:
            facts.append(str(attributes[names.STALL_CAUSE]))
        if names.PREEMPT_MODE in attributes:
            num_blocks = attributes[names.PREEMPT_NUM_BLOCKS]
            facts.append(f"{attributes[names.PREEMPT_MODE]}, {num_blocks} blocks lost")
        if names.FINISH_REASON in attributes:
            facts.append(f"finish {attributes[names.FINISH_REASON]}")
        culprits = [self._names[link] for link in span.links if self._names.get(link)]
        return " ".join([*facts, *(f"→ {culprit}" for culprit in culprits)])

    def _x(self, time_ns: int) -> float:
        share = (time_ns - self._start_ns) / self._time_ns
        return self._left + share * (self._right - self._left)

    def _box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{colour}"/>'
        )


def _time_text(time_ms: float) -> str:
    return f"{time_ms / 1e3:g} s" if time_ms >= _MS_SHOWN_MAX else f"{time_ms:g} ms"


def _round_step(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, … that is not less."""
    power = 1.0
    while True:
        for factor in (1.0, 2.0, 5.0):
            if factor * power >= step:
                return factor * power
        power *= 10.0
