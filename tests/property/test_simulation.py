"""The whole system in virtual time, with faults: every seed is a small world of its own."""

import os
import subprocess
import sys

import pytest

from pageframe.lab.simulation.__main__ import run_seeds

NUM_SEEDS = 300
NUM_SEEDS_AT_ONCE = 10


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, NUM_SEEDS_AT_ONCE))
def test_whatever_happens_every_request_ends_as_it_must(first: int) -> None:
    outcomes = list(run_seeds(first, first + NUM_SEEDS_AT_ONCE))
    broken = {outcome.seed: outcome.violations[:3] for outcome in outcomes if outcome.violations}
    assert not broken, f"make sim SEED={next(iter(broken))}: {broken}"
    assert all(outcome.num_requests for outcome in outcomes), "somebody asked for something"


def test_a_seed_is_the_same_run_in_every_process() -> None:
    """Nothing may hang on addresses, on the order of sets, on real time or on entropy."""
    digests = set()
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "pageframe.lab.simulation", "--seeds", "3:8", "--json"]
        output = subprocess.run(
            command,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        digests.add(output)
    assert len(digests) == 1
    assert output.count('"digest"') == 5
