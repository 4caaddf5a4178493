"""Tiny models are built once per session, with HF's answers beside them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exactness import questions, tiny_models
from exactness.questions import Exam
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


@pytest.fixture(scope="session")
def exam_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exam]:
    """Questions that begin alike and HF's answers to them, of a family, by name."""
    made: dict[str, Exam] = {}

    def get(name: str) -> Exam:
        if name not in made:
            made[name] = questions.prepare(name, tmp_path_factory.mktemp(f"exam-{name}"))
        return made[name]

    return get
