"""Systems are started once for as many tests as can share them; starting one takes seconds."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration import models
from integration.system import System

MAX_MODEL_LEN = 4096


@pytest.fixture(scope="session")
def sim_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer of a model that is only simulated."""
    folder = tmp_path_factory.mktemp("models") / "sim"
    return models.write_config_and_tokenizer(folder, max_model_len=MAX_MODEL_LEN)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., System]]:
    """Starts systems, and leaves none behind whatever happens."""
    started: list[System] = []

    def make(model: Path, *arguments: str, **options: str) -> System:
        started.append(
            System(tmp_path_factory.mktemp("up") / "state", model, *arguments, **options)
        )
        return started[-1]

    yield make
    for system in started:
        system.kill()


@pytest.fixture(scope="session")
def slow_system(start: Callable[..., System], sim_model: Path) -> Iterator[System]:
    """Few and slow: eight sequences at once, eight tokens of a prompt in a step of 4 ms."""
    system = start(
        sim_model,
        *("--sim-step", "4ms", "--prefill-chunk-tokens", "8", "--max-num-sequences", "8"),
        *("--block-size", "16", "--num-blocks", "150", "--max-model-len", str(MAX_MODEL_LEN)),
    )
    yield system
    system.settle()
    system.stop()


@pytest.fixture(scope="session")
def llama_system(
    start: Callable[..., System], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    """A tiny random Llama, computed for real."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    models.write_llama(folder, max_model_len=512)
    options = ("--device", "cpu", "--dtype", "fp32", "--num-blocks", "256")
    system = start(folder, *options, runner="native")
    yield system
    system.settle()
    system.stop()
