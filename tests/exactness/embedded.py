"""The embedded model, and English prose in its tokens."""

import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

PAGEFRAME = Path(sys.executable).with_name("pageframe")
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
