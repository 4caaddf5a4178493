"""Can a tenant learn from time whether another one has sent the same prompt? It must not.

    python -m bench.tenant_isolation --model FOLDER [--rounds 40] [--output FILE]

Alice sends a prompt, so that its blocks are cached under her salt. Then, in turns:

    other    Bob sends the same prompt
    fresh    Bob sends a prompt of the same length that nobody has sent
    same     Alice sends hers again

Times to the first token are compared. ``other`` and ``fresh`` must not differ: the verdict is a
permutation test of their medians, and nothing may be found at the 1 % level. ``same`` must be
faster than both, or the comparison would show nothing.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from pageframe.client import GenerationRequest, PageframeClient

PROMPT_TOKENS = 384
NUM_PERMUTATIONS = 10_000
LEVEL = 0.01


@dataclass(slots=True)
class Verdict:
    """Medians in milliseconds, and how likely a difference as large is by chance."""

    num_rounds: int
    other_ms: float
    fresh_ms: float
    same_ms: float
    p_value: float
    num_cached_other: int
    num_cached_same: int

    @property
    def is_isolated(self) -> bool:
        """Whether nothing was found, by a test that could have found something."""
        can_tell = self.same_ms < 0.8 * self.fresh_ms and self.num_cached_same > 0
        return can_tell and self.num_cached_other == 0 and self.p_value >= LEVEL


def time_to_first_token_ms(client: PageframeClient, prompt: list[int]) -> tuple[float, int]:
    """Milliseconds until the first token, and how many prompt tokens were found in the cache."""
    request = GenerationRequest(token_ids=prompt, max_tokens=1, temperature=0.0, ignore_eos=True)
    start_ns = time.perf_counter_ns()
    (sample,) = client.complete(request, timeout_s=120).samples
    return (time.perf_counter_ns() - start_ns) / 1e6, sample.account.num_cached_tokens


def p_value(first: list[float], second: list[float], dice: random.Random) -> float:
    """Share of random divisions of all times whose medians differ at least as much."""
    observed = abs(statistics.median(first) - statistics.median(second))
    pooled = [*first, *second]
    num_as_large = 0
    for _ in range(NUM_PERMUTATIONS):
        dice.shuffle(pooled)
        left, right = pooled[: len(first)], pooled[len(first) :]
        num_as_large += abs(statistics.median(left) - statistics.median(right)) >= observed
    return num_as_large / NUM_PERMUTATIONS


def measure(address: str, num_rounds: int, vocab_size: int, console: Console) -> Verdict:
    """Let the three kinds of request take turns, in an order of its own in each round."""
    dice = random.Random(1)
    times: dict[str, list[float]] = {"other": [], "fresh": [], "same": []}
    cached = dict.fromkeys(times, 0)
    with (
        PageframeClient(address, api_key="key-of-alice") as alice,
        PageframeClient(address, api_key="key-of-bob") as bob,
    ):
        for _ in track(range(num_rounds), "rounds", console=console):
            prompt = [dice.randrange(2, vocab_size) for _ in range(PROMPT_TOKENS)]
            fresh = [dice.randrange(2, vocab_size) for _ in range(PROMPT_TOKENS)]
            time_to_first_token_ms(alice, prompt)
            kinds = [("other", bob, prompt), ("fresh", bob, fresh), ("same", alice, prompt)]
            dice.shuffle(kinds)
            for kind, client, tokens in kinds:
                elapsed_ms, num_cached = time_to_first_token_ms(client, tokens)
                times[kind].append(elapsed_ms)
                cached[kind] += num_cached
    return Verdict(
        num_rounds=num_rounds,
        other_ms=round(statistics.median(times["other"]), 2),
        fresh_ms=round(statistics.median(times["fresh"]), 2),
        same_ms=round(statistics.median(times["same"]), 2),
        p_value=p_value(times["other"], times["fresh"], dice),
        num_cached_other=cached["other"],
        num_cached_same=cached["same"],
    )


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description="Compare times over tenants.")
    parser.add_argument("--model", type=Path, required=True, help="a prepared model's folder")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, help="write the verdict here as JSON")
    arguments = parser.parse_args()
    vocab_size = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="pageframe-tenants-") as name:
        folder = Path(name)
        keys = folder / "keys.txt"
        keys.write_text("key-of-alice alice\nkey-of-bob bob\n")
        keys.chmod(0o600)
        command = [str(Path(sys.executable).with_name("pageframe")), "up"]
        command += [
            "--model",
            str(arguments.model),
            "--grpc",
            "127.0.0.1:0",
            "--http",
            "off",
            "--metrics-port",
            "0",
        ]
        command += ["--state-dir", str(folder / "state"), "--api-keys", str(keys)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                address = line.removeprefix("pageframe ready grpc=").split()[0]
                verdict = measure(address, arguments.rounds, vocab_size, Console(stderr=True))
            finally:
                process.terminate()
    document = json.dumps(asdict(verdict) | {"is_isolated": verdict.is_isolated}, indent=2)
    print(document)
    if arguments.output is not None:
        arguments.output.write_text(document + "\n", encoding="utf-8")
    return 0 if verdict.is_isolated else 1


if __name__ == "__main__":
    sys.exit(main())
