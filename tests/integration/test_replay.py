"""A run of real processes, recorded, is replayed by another process decision for decision."""

import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from integration.system import PAGEFRAME, PATIENCE_S, System, environment, eventually
from pageframe.client import GenerationRequest
from pageframe.v1.gateway_service_pb2 import GenerateRequest, TokenIds
from pageframe.v1.sequence_pb2 import SamplingParameters


def replay(path: Path, *arguments: str) -> dict:
    done = subprocess.run(
        [str(PAGEFRAME), "replay", str(path), "--json", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    assert done.returncode == 0, document.get("difference")
    return document


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            token_ids=[5] * (10 * (1 + index % 7)) + [index],
            max_tokens=5 + 3 * index,
            seed=index,
            num_samples=1 + index % 3,
            session_id="chat" if index % 5 == 0 else "",
            temperature=0.0 if index % 4 == 0 else 1.0,
        )
        for index in range(20)
    ]


def begin_and_go_away(system: System) -> None:
    """A caller that leaves after its first token."""
    request = GenerateRequest(
        token_ids=TokenIds(ids=[9] * 30),
        sampling=SamplingParameters(max_tokens=3000, seed=1, ignore_eos=True),
    )
    with system.stream(request) as messages:
        while next(messages).WhichOneof("message") != "delta":
            pass


def test_a_recorded_system_is_replayed_decision_for_decision(
    start: Callable[..., System], sim_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "journal"
    system = start(
        sim_model,
        *("--record", str(path), "--sim-step", "2ms", "--num-blocks", "60"),
        *("--max-num-sequences", "16", "--token-budget", "48", "--max-model-len", "600"),
    )
    with ThreadPoolExecutor(10) as pool:
        results = list(pool.map(system.complete, requests()))
    assert len(results) == 20
    system.settle()
    system.stop()
    report = replay(path)
    assert report["is_same"]
    assert report["num_requests"] == 20
    assert report["num_steps"] == report["num_steps_same"] > 20
    assert report["memory_stopped"] == ""
    assert report["num_results"] == report["num_results_same"] > 20
    compared = replay(path, "--policy", "token-budget=512")
    assert [policy["num_finished"] for policy in compared["policies"]] == [20, 20]


def test_cancels_and_a_lost_executor_are_replayed(
    start: Callable[..., System], sim_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "journal"
    system = start(sim_model, "--record", str(path), "--sim-step", "4ms", "--num-blocks", "400")
    begin_and_go_away(system)
    with ThreadPoolExecutor(1) as pool:
        request = GenerationRequest(token_ids=[7] * 50, max_tokens=200, seed=2, request_id="long")
        result = pool.submit(system.complete, request)
        eventually(lambda: system.sequence("long") is not None, "it runs")
        system.kill_service("executor")
        assert result.result(PATIENCE_S) is not None
    system.wait_restarted("executor")
    system.settle()
    system.stop()
    report = replay(path)
    assert report["num_steps"] == report["num_steps_same"] > 200
    assert report["num_results"] == report["num_results_same"]
