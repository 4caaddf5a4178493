"""`pageframe chat` through a whole system: a turn computes only what is new."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from integration.system import PAGEFRAME, PATIENCE_S, System, environment


def test_the_blocks_of_a_turn_are_found_by_the_next_one(
    start: Callable[..., System], sim_model: Path
) -> None:
    system = start(sim_model, "--sim-step", "0")
    turns = "The first thing that I say is rather long.\nThe second one is short.\n"
    command = [str(PAGEFRAME), "chat", "--json", "--max-tokens", "20", "--seed", "1"]
    ended = subprocess.run(
        [*command, "--server", system.address],
        input=turns,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    first, second = map(json.loads, ended.stdout.splitlines())
    assert first["usage"]["cached_tokens"] == 0
    # All whole blocks of the first prompt at the least.
    assert second["usage"]["cached_tokens"] >= first["usage"]["prompt_tokens"] // 16 * 16 > 0
    assert first["session_id"] == second["session_id"]
    system.settle()
    system.stop()
