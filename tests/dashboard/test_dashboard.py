"""The Grafana dashboard before a real Prometheus: every panel shows what happened in a real run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dashboard.grafana import Query, rate_interval_s, read_panels
from dashboard.picture import UNITS, draw, draw_top
from dashboard.prometheus import (
    CONFIG,
    Prometheus,
    config_for,
    faults_of_config,
    faults_of_page,
)
from dashboard.traffic import TENANTS
from dashboard.watched import DASHBOARD, Answer, Watched

PICTURE = "dashboard.png"

pytestmark = pytest.mark.slow


def panel_of(watched: Watched, title: str) -> list[Answer]:
    (number,) = [place for place, panel in enumerate(watched.panels) if panel.title == title]
    return watched.answers[number]


def most(answer: Answer, **labels: str) -> float:
    """The highest value of the series with these labels."""
    return max(
        value
        for series in answer.series
        if labels.items() <= series.labels.items()
        for _, value in series.points
    )


def test_every_panel_shows_something(watched: Watched) -> None:
    assert list(watched.faults()) == []


def test_panels_show_what_happened(watched: Watched) -> None:
    pool = panel_of(watched, "Pool by state")[0]
    assert most(pool, state="held") <= 56
    assert {series.labels["state"] for series in pool.series} >= {"free", "held", "cached"}
    tenants = panel_of(watched, "Output tokens by tenant")[0]
    assert {series.labels["tenant"] for series in tenants.series} == {it.name for it in TENANTS}
    # Instructions are 70 tokens of at most 195, and four whole blocks of them can be shared.
    hits = panel_of(watched, "Prefix hits")[0]
    assert 64 / 195 < most(hits) <= 1
    waits = panel_of(watched, "Stalls by cause")[0]
    assert most(waits, cause="kv_full") > 0
    outcomes = {series.labels["outcome"] for series in panel_of(watched, "Requests")[0].series}
    assert outcomes == {"ok", "client_gone", "sampling_parameter_out_of_range"}
    assert most(panel_of(watched, "Health")[0]) == 1


def test_promtool_finds_no_fault_with_the_pages(watched: Watched) -> None:
    assert {service: faults_of_page(page) for service, page in watched.pages.items()} == {
        "gateway": "",
        "scheduler": "",
        "executor": "",
    }


def test_promtool_sees_a_fault_where_there_is_one(has_prometheus: None) -> None:
    assert "total" in faults_of_page("# TYPE requests counter\nrequests 1\n")


def test_promtool_finds_no_fault_with_the_config_of_the_compose_file(has_prometheus: None) -> None:
    assert faults_of_config() == ""


def test_the_picture_has_every_panel(
    watched: Watched, tmp_path: Path, pictures: Path | None
) -> None:
    file = (pictures or tmp_path) / PICTURE
    texts = draw(watched, file)
    assert {panel.title for panel in watched.panels} <= {text.removeprefix("▾ ") for text in texts}
    assert {tenant.name for tenant in TENANTS} <= set(texts)
    with Image.open(file) as picture:
        assert picture.width >= 1000
    assert file.stat().st_size < 400_000
    first_rows = file.with_stem("dashboard-top")
    draw_top(file, watched.panels, "KV memory", first_rows)
    with Image.open(first_rows) as picture:
        assert 500 < picture.height < 1200


def test_a_query_without_data_is_a_fault(watched: Watched) -> None:
    number = next(iter(watched.answers))
    empty = [Answer(Query("pageframe_nothing", ""), [])]
    faults = list(replace(watched, answers={number: empty}).faults())
    assert faults[0].endswith("no data for pageframe_nothing")


def test_what_prometheus_refuses_is_told(has_prometheus: None) -> None:
    with Prometheus(["127.0.0.1:1", "127.0.0.2:1", "127.0.0.3:1"], scrape_s=1) as prometheus:
        prometheus.wait_scraping(0)
        with pytest.raises(ValueError, match=r"sum\(up: .*parse error"):
            prometheus.query_range("sum(up", begin_s=0, end_s=1, step_s=1)
        assert prometheus.query_range("nothing_at_all", begin_s=0, end_s=1, step_s=1) == []


def test_a_variable_that_is_not_known_is_an_error() -> None:
    query = Query("rate(a[$__rate_interval]) * $factor", "")
    with pytest.raises(KeyError, match="factor"):
        query.with_variables({"__rate_interval": "4s"})


def test_variables_and_legends_are_put_in() -> None:
    query = Query("rate(a[${__rate_interval}])", "{{state}} of {{ tenant }}")
    assert query.with_variables({"__rate_interval": "4s"}) == "rate(a[4s])"
    assert query.name_of({"state": "held", "tenant": "atlas"}) == "held of atlas"
    assert rate_interval_s(step_s=1, scrape_s=1) == 4
    assert rate_interval_s(step_s=30, scrape_s=5) == 35


def test_a_kind_of_panel_that_is_not_drawn_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "dashboard.json"
    place = {"x": 0, "y": 0, "w": 4, "h": 4}
    file.write_text(json.dumps({"panels": [{"type": "gauge", "title": "A", "gridPos": place}]}))
    with pytest.raises(ValueError, match="panel A is a gauge"):
        read_panels(file)


def test_no_two_panels_of_the_dashboard_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in read_panels(DASHBOARD):
        for column in range(panel.left, panel.left + panel.width):
            for row in range(panel.top, panel.top + panel.height):
                assert (column, row) not in taken, f"{panel.title} is on {taken[column, row]}"
                taken[column, row] = panel.title


def test_the_config_is_that_of_the_compose_file_with_other_targets() -> None:
    text = CONFIG.read_text()
    ours = config_for(text, ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"], 1)
    assert '["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]' in ours
    assert len(ours.splitlines()) == len(text.splitlines())
    with pytest.raises(ValueError, match="0 times"):
        config_for(ours, ["a", "b", "c"], 1)


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("s", 0.0125, "12.5 ms"),
        ("s", 0, "0 s"),
        ("s", 90, "90 s"),
        ("short", 1500, "1.5 K"),
        ("short", 0.5, "0.5"),
        ("percentunit", 0.625, "62.5%"),
        ("reqps", 3, "3 req/s"),
        ("ops", 2_500_000, "2.5 Mil ops/s"),
    ],
)
def test_values_are_written_in_their_units(unit: str, value: float, text: str) -> None:
    assert UNITS[unit](value) == text
