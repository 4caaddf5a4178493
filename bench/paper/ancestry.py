"""Recorded beam searches: which beam of the step before each beam continues.

A step of a search of width k is k *parents*: beam ``i`` of the new step continues beam
``parents[i]`` of the step before. A beam that nobody continues is dropped.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ANCESTRY_PATH = Path(__file__).resolve().parents[1] / "data" / "beam_ancestry.npz"

Parents = NDArray[np.uint8]
"""uint8 [num_searches, num_steps, width]."""


def write_recordings(path: Path, recordings: Mapping[int, Parents]) -> None:
    """Write recordings by width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        named: dict[str, Any] = {f"width_{width}": parents for width, parents in recordings.items()}
        np.savez_compressed(file, **named)


def read_recordings(path: Path = ANCESTRY_PATH) -> dict[int, Parents]:
    """Recordings by width, narrowest first."""
    with np.load(path, allow_pickle=False) as arrays:
        found = {int(name.removeprefix("width_")): arrays[name] for name in arrays.files}
    return dict(sorted(found.items()))


def replay(recording: Parents, rng: np.random.Generator) -> Iterator[list[int]]:
    """Steps of recorded searches without end: one search after another, in random order.

    A search begins where it was recorded, at the prompt. Where one ends and the next begins, the
    descent goes on: the next one's first steps stand for what the beams do then.
    """
    while True:
        for index in rng.permutation(len(recording)):
            yield from recording[index].tolist()
