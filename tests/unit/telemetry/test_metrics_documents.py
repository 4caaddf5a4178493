"""The table of metrics and the Grafana dashboard say what the code says."""

import json
import re
from pathlib import Path

from pageframe.telemetry.metrics import METRICS, MetricKind

_DOCS = Path(__file__).resolve().parents[3] / "docs"
_NAME = re.compile(r"\bpageframe_\w+\b")
_BY = re.compile(r"by \(([^)]*)\) \((?:rate\()?(pageframe_\w+)")
_HISTOGRAM_SUFFIXES = ("_bucket", "_sum", "_count")


def row_of(metric):
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    services = ", ".join(metric.services)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {services} | {metric.help} |"


def known_names():
    names = {metric.name: metric for metric in METRICS}
    for metric in METRICS:
        if metric.kind is MetricKind.HISTOGRAM:
            names |= {metric.name + suffix: metric for suffix in _HISTOGRAM_SUFFIXES}
    return names


def panels():
    dashboard = json.loads((_DOCS / "grafana" / "pageframe.json").read_text(encoding="utf-8"))
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions():
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def test_the_table_has_one_row_for_each_metric():
    text = (_DOCS / "metrics.md").read_text(encoding="utf-8")
    written = [line for line in text.splitlines() if line.startswith("| `pageframe_")]
    expected = [row_of(metric) for metric in METRICS]
    assert written == expected, "the table must be:\n" + "\n".join(expected)


def test_the_dashboard_asks_for_what_there_is():
    names = known_names()
    for expression in expressions():
        asked = _NAME.findall(expression)
        assert asked, expression
        assert set(asked) <= set(names), expression


def test_the_dashboard_groups_by_labels_that_there_are():
    names = known_names()
    for expression in expressions():
        for labels, name in _BY.findall(expression):
            wanted = {label.strip() for label in labels.split(",")} - {"le"}
            assert wanted <= set(names[name].labels), expression


def test_counters_are_shown_as_rates_and_nothing_else_is():
    names = known_names()
    for expression in expressions():
        rated = set(re.findall(r"rate\((pageframe_\w+)", expression))
        for name in _NAME.findall(expression):
            assert (name in rated) == (names[name].kind is not MetricKind.GAUGE), expression


def test_every_metric_has_its_place_in_the_dashboard():
    names = known_names()
    shown = {names[name].name for text in expressions() for name in _NAME.findall(text)}
    assert shown == {metric.name for metric in METRICS}


def test_panels_have_names_and_places_of_their_own():
    titles = [panel["title"] for panel in panels()]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels()]
    assert len(set(titles)) == len(titles)
    assert len(set(places)) == len(places)
