"""Tiny models are built once per session, with HF's answers beside them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exactness import tiny_models
from exactness.tiny_models import GreedyAnswer

PROMPT_LENGTHS = (1, 5, 37, 2, 64, 23, 1, 90)
MAX_NEW_TOKENS = 14


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, list[list[int]], list[GreedyAnswer]]]:
    """Folder, prompts and HF's greedy answers of a family, by name."""
    made: dict[str, tuple[Path, list[list[int]], list[GreedyAnswer]]] = {}

    def get(name: str) -> tuple[Path, list[list[int]], list[GreedyAnswer]]:
        if name not in made:
            folder = tiny_models.build(name, tmp_path_factory.mktemp(name))
            prompt_ids = tiny_models.prompts(PROMPT_LENGTHS)
            made[name] = (
                folder,
                prompt_ids,
                tiny_models.hf_greedy(folder, prompt_ids, MAX_NEW_TOKENS),
            )
        return made[name]

    return get
