"""The command line of a chaos run; see the package."""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench.chaos.rounds import chaos
from bench.chaos.system import System
from bench.chaos.verdict import report

KINDS = ("executor", "scheduler", "gateway")
SIM_OPTIONS = (
    *("--sim-step", "5ms", "--prefill-chunk-tokens", "32", "--max-num-sequences", "24"),
    *("--block-size", "16", "--num-blocks", "160", "--max-model-len", "1024"),
)
MODEL_OPTIONS = (
    *("--device", "cpu", "--dtype", "fp32", "--max-num-sequences", "24"),
    # A step takes as long as its tokens; who asks in the midst of one waits for its end.
    *("--token-budget", "128"),
    *("--block-size", "16", "--num-blocks", "120", "--max-model-len", "1024"),
)
# A model computes everything anew after each death: with less between them nothing would ever end.
_MODEL_PAUSE_S = 8.0


def main() -> int:
    """Run it as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, help="100, or 5 with a real model")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--runner", choices=("sim", "native"), default="sim")
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr)
    is_sim = options.runner == "sim"
    with tempfile.TemporaryDirectory(prefix="pf-") as folder:
        state_dir = Path(folder) / "state"
        arguments = SIM_OPTIONS if is_sim else MODEL_OPTIONS
        with System(state_dir, options.model, options.runner, arguments) as system:
            verdict = asyncio.run(
                chaos(
                    system,
                    rounds=options.rounds or (100 if is_sim else 5),
                    seed=options.seed,
                    kinds=tuple(options.kinds.split(",")),
                    vocab_size=400,
                    longest=160 if is_sim else 24,
                    pause_s=0.3 if is_sim else _MODEL_PAUSE_S,
                )
            )
    if options.json:
        print(json.dumps(asdict(verdict) | {"is_well": verdict.is_well}))
    else:
        print("\n".join(report(verdict)))
    return 0 if verdict.is_well else 1


if __name__ == "__main__":
    sys.exit(main())
