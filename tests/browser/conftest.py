"""A real Chromium, without a window, and a real system before which it stands.

Chromium comes from the machine (Debian: `apt-get install chromium`), Playwright only drives it.
Where one of the two is missing these tests are skipped and say so; with
`POOL_PAGE_BROWSER=required` that is a failure.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration import models
from integration.system import System

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
MAX_MODEL_LEN = 2048


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need a browser."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


def _missing(what: str) -> None:
    if os.environ.get("POOL_PAGE_BROWSER") == "required":
        pytest.fail(what)
    pytest.skip(f"THE POOL PAGE WAS NOT TESTED: {what}")


# Of a module: Playwright keeps an event loop running meanwhile, and other tests start their own.
@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    """A browser; pages of it share nothing."""
    found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if found is None:
        _missing("there is no Chromium; on Debian: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("there is no Playwright; `make setup` installs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found,
            # A container has no user namespaces and little shared memory; pages here are ours.
            args=["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
        )
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture
def new_page(chromium) -> Iterator[Callable[..., object]]:
    """Opens pages; whatever one of them complains of, or asks of others, fails the test.

    But for a complaint that has ``allowed`` in it: a refusal that the test asks for.
    """
    contexts, complaints = [], []

    def make(*, allowed: str = "status of 401", **options: object) -> object:
        options = {"viewport": {"width": 1440, "height": 1000}} | options
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("console", lambda said: _note(complaints, said, allowed))
        page.on("request", lambda asked: _note_request(complaints, asked.url))
        page.set_default_timeout(30_000)
        return page

    yield make
    for context in contexts:
        context.close()
    assert complaints == []


def _note(complaints: list[str], said: object, allowed: str) -> None:
    # A refusal that a test asks for stands in the console, too; the page shows it by itself. And
    # it is the tests that read pixels.
    is_ours = allowed in said.text or "getImageData" in said.text
    if said.type in ("error", "warning") and not is_ours:
        complaints.append(f"{said.type}: {said.text}")


def _note_request(complaints: list[str], url: str) -> None:
    if not url.startswith(("http://127.0.0.1:", "data:")):
        complaints.append(f"asked of others: {url}")


@pytest.fixture(scope="session")
def sim_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer of a model that is only simulated."""
    folder = tmp_path_factory.mktemp("models") / "sim"
    return models.write_config_and_tokenizer(folder, max_model_len=MAX_MODEL_LEN)


@pytest.fixture(scope="session")
def start_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., System]]:
    """Starts systems, and leaves none behind whatever happens."""
    started: list[System] = []

    def make(model: Path, *arguments: str) -> System:
        started.append(System(tmp_path_factory.mktemp("up") / "state", model, *arguments))
        return started[-1]

    yield make
    for system in started:
        system.kill()
