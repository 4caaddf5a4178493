"""A system under traffic that Prometheus watches, and what every panel of the dashboard shows."""

import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dashboard.grafana import Panel, Query, rate_interval_s, read_panels
from dashboard.prometheus import Prometheus, Series
from dashboard.traffic import SYSTEM_OPTIONS, access_lines, run_traffic
from integration.system import System
from pageframe.config.settings import METERED_SERVICES
from ports import free_ports

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "pageframe.json"
SCRAPE_S = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """What one query of a panel was answered.

    Attributes:
        query: Which.
        series: One for each set of labels.
        fault: Why there is none; empty when there is no fault.
    """

    query: Query
    series: list[Series]
    fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """All that was seen.

    Attributes:
        begin_s: Seconds since the epoch when traffic began.
        end_s: When it had ended.
        outcomes: Requests by how they ended, as callers saw it.
        panels: The dashboard's, headings too.
        answers: Of each panel's queries, by the panel's place in ``panels``.
        pages: Each service's page of metrics at the end.
    """

    begin_s: float
    end_s: float
    outcomes: dict[str, int]
    panels: list[Panel]
    answers: dict[int, list[Answer]] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)

    def faults(self) -> Iterator[str]:
        """Every query that Prometheus refused or knows nothing for; every panel of zeros."""
        for number, answers in self.answers.items():
            title = self.panels[number].title
            for answer in answers:
                if answer.fault:
                    yield f"{title}: {answer.fault}"
                elif not any(series.points for series in answer.series):
                    yield f"{title}: no data for {answer.query.expression}"
            values = [value for answer in answers for value in _values(answer)]
            if values and not any(values):
                yield f"{title}: nothing but zeros"


def watch(
    start: Callable[..., System], model: Path, folder: Path, *, seconds: float, seed: int
) -> Watched:
    """Start a system and Prometheus, let traffic run, and ask what every panel asks.

    Args:
        start: Starts a system, and ends it whatever happens.
        model: Folder of a model that is computed.
        folder: For the access file.
        seconds: Of traffic.
        seed: Of traffic.
    """
    keys = folder / "keys.txt"
    keys.write_text(access_lines())
    keys.chmod(0o600)
    port = free_ports(len(METERED_SERVICES))
    addresses = [f"127.0.0.1:{port + number}" for number in range(len(METERED_SERVICES))]
    options = (*SYSTEM_OPTIONS, "--metrics-port", str(port), "--api-keys", str(keys))
    system = start(model, "--device", "cpu", "--dtype", "fp32", *options, runner="native")
    with Prometheus(addresses, scrape_s=SCRAPE_S) as prometheus:
        prometheus.wait_scraping(len(addresses))
        begin_s = time.time()
        outcomes = run_traffic(system.address, seconds=seconds, seed=seed)
        end_s = time.time()
        panels = read_panels(DASHBOARD)
        watched = Watched(begin_s=begin_s, end_s=end_s, outcomes=outcomes, panels=panels)
        for number, panel in enumerate(panels):
            if not panel.is_heading:
                answers = [_answer(prometheus, query, watched) for query in panel.queries]
                watched.answers[number] = answers
    for service, address in zip(METERED_SERVICES, addresses, strict=True):
        watched.pages[service] = _page(address)
    system.settle()
    system.stop()
    return watched


def _answer(prometheus: Prometheus, query: Query, watched: Watched) -> Answer:
    step_s = float(SCRAPE_S)
    window_s = rate_interval_s(step_s=step_s, scrape_s=SCRAPE_S)
    try:
        series = prometheus.query_range(
            query.with_variables({"__rate_interval": f"{window_s:g}s"}),
            begin_s=watched.begin_s,
            end_s=watched.end_s,
            step_s=step_s,
        )
    except ValueError as error:
        return Answer(query, [], str(error))
    return Answer(query, series)


def _values(answer: Answer) -> Iterator[float]:
    return (value for series in answer.series for _, value in series.points)


def _page(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as page:
        text: str = page.read().decode()
    return text
