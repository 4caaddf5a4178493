"""A real Prometheus before a real system; it comes from the machine (Debian: `prometheus`).

Where there is none these tests are skipped and say so; with `DASHBOARD_PROMETHEUS=required` that is
a failure. With `DASHBOARD_PICTURES=FOLDER` the dashboard is drawn into that folder.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dashboard import prometheus
from dashboard.watched import Watched, watch
from integration import models
from integration.system import System

# The picture of the documents tells a longer story than a test needs.
SECONDS, PICTURE_SECONDS = 20.0, 90.0
SEED = 20


@pytest.fixture(scope="session")
def has_prometheus() -> None:
    """Skips, or fails, where Prometheus is not installed."""
    if prometheus.is_here():
        return
    missing = "there is no Prometheus; on Debian: apt-get install prometheus"
    if os.environ.get("DASHBOARD_PROMETHEUS") == "required":
        pytest.fail(missing)
    pytest.skip(f"THE DASHBOARD WAS NOT TESTED: {missing}")


@pytest.fixture(scope="session")
def start_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., System]]:
    """Starts systems, and leaves none behind whatever happens."""
    started: list[System] = []

    def make(model: Path, *arguments: str, **options: str) -> System:
        folder = tmp_path_factory.mktemp("up") / "state"
        started.append(System(folder, model, *arguments, **options))
        return started[-1]

    yield make
    for system in started:
        system.kill()


@pytest.fixture(scope="session")
def pictures() -> Path | None:
    """Where pictures go; None when nobody asked for any."""
    asked = os.environ.get("DASHBOARD_PICTURES")
    return Path(asked) if asked else None


@pytest.fixture(scope="session")
def watched(
    has_prometheus: None,
    start_system: Callable[..., System],
    tmp_path_factory: pytest.TempPathFactory,
    pictures: Path | None,
) -> Watched:
    """A system that computes a tiny random Llama for four tenants, as Prometheus saw it."""
    folder = tmp_path_factory.mktemp("dashboard")
    model = models.write_llama(folder / "llama", max_model_len=512)
    seconds = SECONDS if pictures is None else PICTURE_SECONDS
    print(f"traffic: {seconds:g} s, seed {SEED}")
    return watch(start_system, model, folder, seconds=seconds, seed=SEED)
