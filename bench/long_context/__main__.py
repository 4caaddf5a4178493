"""Chats of 32k tokens on a pool that holds two of them: ``python -m bench.long_context``.

A tiny model with random weights is asked by several chats, each of which fills its context in two
turns. Twice:

    roomy     a pool that holds all chats, nothing shared, no host tier: every turn is computed from
              its first token. Its tokens are the reference, its second turns the price of recompute
    tiered    a pool that holds two chats, and a host tier that holds all. All first turns come at
              once; then the second turns, one after the other, whose blocks have left the device
              meanwhile and come back by promotion

Both go through the real scheduler and the real engine in one thread, in chunks of ``--chunk``
tokens. Tokens have to be equal; with ``--check`` those of the first chat also to Hugging Face's.
Time to first token runs from the submission of a turn to its first token.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from bench.long_context.chats import Shape, ask_hugging_face, build_model
from bench.long_context.study import measure, summarise


def main() -> int:
    """Measure, print, write JSON where asked for; 1 when tokens differ."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    shape = Shape(
        num_context_tokens=arguments.context,
        num_turn_tokens=arguments.turn_tokens,
        num_new_tokens=arguments.new_tokens,
        num_chats=arguments.chats,
        chunk_tokens=arguments.chunk,
        block_size=arguments.block_size,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(shape, folder)
        roomy, tiered = measure(shape, folder)
        report = {"shape": asdict(shape), "machine": _machine(arguments.threads)}
        report |= summarise(roomy, tiered)
        is_equal = bool(report["tokens_equal"])
        if arguments.check:
            own = [tiered.first[0].token_ids, tiered.second[0].token_ids]
            report["equals_hugging_face"] = own == ask_hugging_face(shape, folder)
            is_equal &= bool(report["equals_hugging_face"])
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0 if is_equal else 1


def _machine(num_threads: int) -> dict[str, object]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": models[0] if models else platform.machine(),
        "num_threads": num_threads,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.long_context", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--context", type=int, default=32768, metavar="TOKENS")
    parser.add_argument("--turn-tokens", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=2048, metavar="TOKENS")
    parser.add_argument("--block-size", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="ask Hugging Face as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
