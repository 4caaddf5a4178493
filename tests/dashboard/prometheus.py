"""A Prometheus of our own for a few minutes: loopback, a folder that goes away, our config.

It comes from the machine (Debian: ``apt-get install prometheus``); nothing is downloaded.
"""

import json
import math
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ports import free_ports

CONFIG = Path(__file__).parents[2] / "docker" / "prometheus.yml"
PATIENCE_S = 60.0
_COMPOSE_TARGETS = ("gateway:9464", "scheduler:9465", "executor:9466")
_COMPOSE_INTERVAL = "scrape_interval: 5s"


@dataclass(frozen=True, slots=True)
class Series:
    """What a query answers for one set of labels.

    Attributes:
        labels: Name to value.
        points: Seconds since the epoch, and values; not-a-numbers are left out.
    """

    labels: dict[str, str]
    points: list[tuple[float, float]]


def is_here() -> bool:
    """Whether this machine has Prometheus and its tool."""
    return shutil.which("prometheus") is not None and shutil.which("promtool") is not None


def faults_of_config(file: Path = CONFIG) -> str:
    """What ``promtool`` has against a config; empty when nothing."""
    return _promtool("check", "config", "--lint=all", "--lint-fatal", str(file))


def faults_of_page(text: str) -> str:
    """What ``promtool`` has against a page of metrics; empty when nothing."""
    return _promtool("check", "metrics", told=text)


def _promtool(*arguments: str, told: str = "") -> str:
    checked = subprocess.run(
        ["promtool", *arguments], input=told, capture_output=True, text=True, check=False
    )
    return "" if checked.returncode == 0 else checked.stdout + checked.stderr


def config_for(text: str, addresses: list[str], scrape_s: int) -> str:
    """The compose file's config with other targets and another interval; all else as it is."""
    replaced = [(_COMPOSE_INTERVAL, f"scrape_interval: {scrape_s}s")]
    replaced += list(zip(_COMPOSE_TARGETS, addresses, strict=True))
    for old, new in replaced:
        if text.count(old) != 1:
            raise ValueError(f"{CONFIG} has {old!r} {text.count(old)} times, not once")
        text = text.replace(old, new)
    return text


class Prometheus:
    """A running Prometheus that scrapes some addresses. A context manager.

    Args:
        addresses: Gateway, scheduler and executor, ``HOST:PORT``.
        scrape_s: Seconds between two scrapes.
    """

    def __init__(self, addresses: list[str], *, scrape_s: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pageframe-prometheus-")
        folder = Path(self._folder.name)
        ours = folder / "prometheus.yml"
        text = config_for(CONFIG.read_text(encoding="utf-8"), addresses, scrape_s)
        ours.write_text(text, encoding="utf-8")
        self._address = f"127.0.0.1:{free_ports(1)}"
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={ours}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self._address}",
                ],
                stdout=log,
                stderr=log,
            )

    def wait_scraping(self, num_targets: int) -> None:
        """Wait until every target was scraped once.

        Raises:
            TimeoutError: some was not within a minute.
            RuntimeError: Prometheus has ended.
        """
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise RuntimeError(f"prometheus has ended\n{self._log.read_text()}")
            try:
                answer = self._get("query", query="sum(up)")
            except (urllib.error.URLError, ValueError):
                # Not there yet, or there and not ready.
                answer = {"result": []}
            if answer["result"] and float(answer["result"][0]["value"][1]) == num_targets:
                return
            time.sleep(0.05)
        raise TimeoutError(f"not all of {num_targets} targets are up\n{self._log.read_text()}")

    def query_range(
        self, expression: str, *, begin_s: float, end_s: float, step_s: float
    ) -> list[Series]:
        """Evaluate an expression at every step of ``[begin_s, end_s]``.

        Raises:
            ValueError: Prometheus does not understand it; with its reason.
        """
        answer = self._get(
            "query_range", query=expression, start=str(begin_s), end=str(end_s), step=str(step_s)
        )
        return [_series(entry) for entry in answer["result"]]

    def _get(self, method: str, **parameters: str) -> dict[str, Any]:
        url = f"http://{self._address}/api/v1/{method}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
                said: dict[str, Any] = json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{parameters['query']}: {error.read().decode()}") from error
        return said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


def _series(entry: dict[str, Any]) -> Series:
    points = [(float(at_s), float(value)) for at_s, value in entry["values"]]
    return Series(entry["metric"], [point for point in points if not math.isnan(point[1])])
