"""What a dashboard's file asks for: panels with their places, and queries with variables put in.

Only what our dashboard uses is read; anything else is an error rather than a wrong picture.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRID_COLUMNS = 24
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
_LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of a panel.

    Attributes:
        expression: PromQL, with Grafana's variables in it.
        legend: With labels as ``{{name}}``; empty for all labels.
    """

    expression: str
    legend: str

    def with_variables(self, values: Mapping[str, str]) -> str:
        """The expression as Prometheus understands it.

        Raises:
            KeyError: a variable that nobody gave a value.
        """
        return _VARIABLE.sub(lambda found: values[found[1]], self.expression)

    def name_of(self, labels: Mapping[str, str]) -> str:
        """What the legend says of a series."""
        if not self.legend:
            return ", ".join(f"{name}={value}" for name, value in sorted(labels.items()))
        return _LABEL.sub(lambda found: labels.get(found[1], found[1]), self.legend)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One rectangle of a dashboard, in units of its grid of 24 columns.

    Attributes:
        title: Above it.
        left: First column.
        top: First row.
        width: Columns.
        height: Rows.
        is_heading: Whether it only heads what is below it.
        unit: Grafana's name of the unit.
        is_stacked: Whether series stand on one another.
        opacity: Of what is under a line, in [0, 1].
        queries: What is drawn; empty for a heading.
    """

    title: str
    left: int
    top: int
    width: int
    height: int
    is_heading: bool
    unit: str
    is_stacked: bool
    opacity: float
    queries: tuple[Query, ...]


def rate_interval_s(*, step_s: float, scrape_s: float) -> float:
    """Grafana's ``$__rate_interval``: no window is so short that it misses a scrape."""
    return max(step_s + scrape_s, 4 * scrape_s)


def read_panels(file: Path) -> list[Panel]:
    """All panels of a dashboard, headings too, in the order of the file.

    Raises:
        ValueError: a kind of panel that is not known here.
    """
    return [_panel(entry) for entry in json.loads(file.read_text(encoding="utf-8"))["panels"]]


def _panel(entry: dict[str, Any]) -> Panel:
    if entry["type"] not in ("row", "timeseries"):
        raise ValueError(f"panel {entry['title']} is a {entry['type']}, which is not drawn here")
    place = entry["gridPos"]
    defaults = entry.get("fieldConfig", {}).get("defaults", {})
    custom = defaults.get("custom", {})
    return Panel(
        title=entry["title"],
        left=place["x"],
        top=place["y"],
        width=place["w"],
        height=place["h"],
        is_heading=entry["type"] == "row",
        unit=defaults.get("unit", "short"),
        is_stacked=custom.get("stacking", {}).get("mode") == "normal",
        opacity=custom.get("fillOpacity", 0) / 100,
        queries=tuple(
            Query(target["expr"], target.get("legendFormat", ""))
            for target in entry.get("targets", ())
        ),
    )
