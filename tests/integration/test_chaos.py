"""Processes die at random under load: no request is lost, no token changes, no block is leaked."""

import asyncio
from pathlib import Path

import pytest

from bench.chaos.__main__ import KINDS, SIM_OPTIONS
from bench.chaos.rounds import chaos
from bench.chaos.system import System
from bench.chaos.verdict import report

SEED = 20


@pytest.mark.slow
def test_five_deaths_are_stalls_and_nothing_more(tmp_path: Path, sim_model: Path) -> None:
    with System(tmp_path / "state", str(sim_model), "sim", SIM_OPTIONS) as system:
        verdict = asyncio.run(
            chaos(system, rounds=5, seed=SEED, kinds=KINDS, vocab_size=400, longest=48)
        )
    print("\n".join(report(verdict)))
    assert {kill.kind for kill in verdict.kills} == set(KINDS), "the seed kills each of them"
    assert verdict.num_requests > 0
    assert all(kill.num_under_way > 0 for kill in verdict.kills)
    assert verdict.wrong == []
    assert verdict.failed == []
    assert verdict.is_at_rest, "a block was leaked"
