"""Count the tokens of ShareGPT's first exchanges: ``python -m bench.paper.make_lengths FOLDER``."""

import argparse
from pathlib import Path

import numpy as np
from rich.progress import track
from tokenizers import Tokenizer

from bench.paper.lengths import LENGTHS_PATH
from bench.paper.sharegpt import find_dataset, read_exchanges

_NUM_AT_ONCE = 256


def main() -> None:
    """Write the file of lengths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder that `pageframe model prepare` prints")
    parser.add_argument("--dataset", type=Path, help="JSON file; default: the installed package")
    parser.add_argument("--output", type=Path, default=LENGTHS_PATH)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    exchanges = read_exchanges(arguments.dataset or find_dataset())
    texts = [text for exchange in exchanges for text in (exchange.prompt, exchange.reply)]
    counts: list[int] = []
    for start in track(range(0, len(texts), _NUM_AT_ONCE), "counting tokens"):
        encodings = tokenizer.encode_batch_fast(
            texts[start : start + _NUM_AT_ONCE], add_special_tokens=False
        )
        counts += [len(encoding.ids) for encoding in encodings]
    lengths = np.array(counts, dtype=np.int32).reshape(-1, 2)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("wb") as file:
        np.savez_compressed(file, num_prompt_tokens=lengths[:, 0], num_output_tokens=lengths[:, 1])


if __name__ == "__main__":
    main()
