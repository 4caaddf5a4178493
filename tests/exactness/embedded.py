"""The embedded model, and English prose in its tokens."""

import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

PAGEFRAME = Path(sys.executable).with_name("pageframe")
# Greedy, flat, filtered and edited sampling, for requests in turns.
KINDS_OF_SAMPLING: tuple[dict, ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 0.0, "frequency_penalty": 0.7, "min_tokens": 5},
    {"temperature": 1.0, "top_p": 0.999, "presence_penalty": 0.4},
)
_PROSE = Path(__file__).parents[2] / "LICENSE"


def prepare() -> Path:
    """The folder of the model, which is made on first use."""
    done = subprocess.run(
        [str(PAGEFRAME), "model", "prepare", "smollm2-135m-instruct"],
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(done.stdout.splitlines()[-1])


def prose(folder: Path) -> list[int]:
    """Some thousands of tokens that belong together."""
    return AutoTokenizer.from_pretrained(folder)(_PROSE.read_text())["input_ids"]
