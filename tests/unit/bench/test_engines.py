"""The comparison of engines: what is asked of them, how answers are checked and shown."""

import shutil
import sys
from pathlib import Path

import pytest

from bench.engines import worker_process
from bench.engines.__main__ import _peers, _turn
from bench.engines.report import as_table, summarise
from bench.engines.worker_process import Measurement, Peer, WorkerProcess
from bench.engines.workloads import NAMES, Workload, attempts, first_token_of, make_workload

VOCAB_SIZE = 49_152

FAKE_WORKER = """
from protocol import serve


class Engine:
    def versions(self):
        print("what an engine prints")
        return {"fake": "1"}

    def run(self, requests, temperature, n):
        print("what an engine prints")
        lengths = [[request["num_output_tokens"]] * n for request in requests]
        lengths[0][0] -= %d
        return lengths


serve(Engine())
"""


BUSY_THEN_AT_REST = """
import threading
import time

from protocol import serve


class Engine:
    def versions(self):
        return {}

    def run(self, requests, temperature, n):
        def work():
            while time.thread_time() < 1.0:
                pass

        threading.Thread(target=work).start()
        return [[request["num_output_tokens"]] * n for request in requests]


serve(Engine())
"""


@pytest.mark.parametrize(
    ("name", "num_requests", "num_prompt_tokens", "num_output_tokens"),
    [
        ("A", 64, 64 * 160, 64 * 100),
        ("B", 48, 48 * 544, 48 * 32),
        ("C", 16, 16 * 32, 16 * 256),
        ("D", 8, 8 * 256, 8 * 8 * 64),
        ("E", 1, 128, 128),
    ],
)
def test_workloads_have_their_sizes(
    name: str, num_requests: int, num_prompt_tokens: int, num_output_tokens: int
) -> None:
    workload = make_workload(name, 0, VOCAB_SIZE)

    assert len(workload.requests) == num_requests
    assert workload.num_prompt_tokens == pytest.approx(num_prompt_tokens, rel=0.01)
    assert workload.num_output_tokens == pytest.approx(num_output_tokens, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_repetitions_differ_in_ids_and_not_in_lengths(name: str) -> None:
    first, second = (make_workload(name, repetition, VOCAB_SIZE) for repetition in (0, 1))

    assert first == make_workload(name, 0, VOCAB_SIZE)
    for one, other in zip(first.requests, second.requests, strict=True):
        assert len(one.prompt_token_ids) == len(other.prompt_token_ids)
        assert one.num_output_tokens == other.num_output_tokens
        # Not even a first block of 16 tokens is the same, so no prefix cache helps.
        assert one.prompt_token_ids[:16] != other.prompt_token_ids[:16]


class NoisyWorker:
    """Something else always runs beside it, least during its second workload."""

    def __init__(self) -> None:
        self.workloads: list[Workload] = []

    def measure(self, workload: Workload) -> Measurement:
        self.workloads.append(workload)
        other_cores = (0.9, 0.5, 0.8)[len(self.workloads) - 1]
        return Measurement(wall_s=1.0, num_wrong=0, own_cores=1.0, other_cores=other_cores)

    def rest(self) -> None:
        pass


def test_a_turn_that_is_done_again_has_other_prompts() -> None:
    worker = NoisyWorker()
    assert _turn(worker, attempts("E", 1, VOCAB_SIZE)).other_cores == 0.5
    prompts = [workload.requests[0].prompt_token_ids for workload in worker.workloads]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 3
    assert [len(prompt) for prompt in prompts] == [128] * 3


def test_every_engine_has_the_same_attempts() -> None:
    one, other = (attempts("D", 2, VOCAB_SIZE) for _ in range(2))
    assert [next(one) for _ in range(3)] == [next(other) for _ in range(3)]


def test_requests_of_b_share_512_tokens_and_no_more() -> None:
    prompts = [request.prompt_token_ids for request in make_workload("B", 0, VOCAB_SIZE).requests]

    assert len({tuple(prompt[:512]) for prompt in prompts}) == 1
    assert len({tuple(prompt[512:]) for prompt in prompts}) == 48


def test_a_lone_first_token_shares_no_prefix_with_its_request() -> None:
    workload = make_workload("E", 0, VOCAB_SIZE)
    first = first_token_of(workload)

    assert first.num_output_tokens == 1
    assert first.requests[0].prompt_token_ids == workload.requests[0].prompt_token_ids[::-1]


@pytest.mark.parametrize("num_missing", [0, 1])
def test_a_worker_answers_whatever_its_engine_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_missing: int
) -> None:
    _fake(tmp_path, monkeypatch, FAKE_WORKER % num_missing)

    with _worker(tmp_path) as worker:
        measurement = worker.measure(make_workload("D", 0, VOCAB_SIZE))

    assert worker.versions == {"fake": "1"}
    assert measurement.num_wrong == num_missing


def test_a_worker_that_dies_is_told_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake(tmp_path, monkeypatch, "raise SystemExit('no such model')")

    with pytest.raises(RuntimeError, match="no such model"):
        _worker(tmp_path)


def _peer(name: str, **options) -> Peer:
    return Peer(**{"name": name, "kind": "vllm", "python": "python", "environment": {}} | options)


@pytest.mark.parametrize(
    ("options", "is_served"),
    [
        ({}, False),
        ({"kind": "ours"}, False),
        ({"kind": "served"}, True),
        ({"kind": "openai"}, True),
        ({"environment": {"ENGINE_SPLIT": "1"}}, True),
    ],
)
def test_served_is_who_computes_in_other_processes(
    options: dict[str, object], is_served: bool
) -> None:
    assert _peer("one", **options).is_served == is_served


def test_the_table_compares_with_the_best_peer_of_each_workload() -> None:
    workload = make_workload("C", 0, VOCAB_SIZE)
    rows = [
        summarise(_peer(engine), workload, [_measurement(wall_s)], [])
        for engine, wall_s in (("pageframe, served", 1.0), ("slow", 4.0), ("fast", 2.0))
    ]

    table = as_table(rows).splitlines()

    assert "| 4096 | 2.00 |" in table[2]
    assert "| 1024 | 0.50 |" in table[3]
    assert "| 2048 | 1.00 |" in table[4]


def test_a_lone_request_tells_first_and_further_tokens_apart() -> None:
    workload = make_workload("E", 0, VOCAB_SIZE)

    row = summarise(_peer("one"), workload, [_measurement(1.32)], [_measurement(0.05)])

    assert row.first_token_ms == pytest.approx(50)
    assert row.token_ms == pytest.approx(10)


def test_peers_are_named_by_kind_or_by_a_name_of_their_own() -> None:
    peers = _peers(["vllm=/a/python", "vllm:split=/a/python"], ["split:ENGINE_SPLIT=1"])

    assert peers == [
        Peer(name="vllm", kind="vllm", python="/a/python", environment={}),
        Peer(name="split", kind="vllm", python="/a/python", environment={"ENGINE_SPLIT": "1"}),
    ]


@pytest.mark.parametrize(
    ("peers", "environment"),
    [(["ollama=/a/python"], []), (["vllm"], []), ([], ["vllm:A=1"])],
)
def test_peers_that_are_none_are_refused(peers: list[str], environment: list[str]) -> None:
    with pytest.raises(ValueError, match="peer"):
        _peers(peers, environment)


def test_what_an_engine_does_behind_its_turn_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake(tmp_path, monkeypatch, BUSY_THEN_AT_REST)
    with _worker(tmp_path) as worker:
        worker.measure(make_workload("E", 0, VOCAB_SIZE))
        before = worker._cpu_s()[1]
        worker.rest()
        rested = worker._cpu_s()[1]
        assert rested - before > 0.5
        worker.rest()
        assert worker._cpu_s()[1] - rested < 0.1


def _fake(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    shutil.copy(worker_process.WORKERS / "protocol.py", folder)
    (folder / "run_fake.py").write_text(source)
    monkeypatch.setattr(worker_process, "WORKERS", folder)


def _worker(folder: Path) -> WorkerProcess:
    peer = Peer(name="fake", kind="fake", python=sys.executable, environment={})
    return WorkerProcess(
        peer, model="none", dtype="float32", num_threads=1, log=folder / "worker.log"
    )


def _measurement(wall_s: float) -> Measurement:
    return Measurement(wall_s=wall_s, num_wrong=0, own_cores=1.0, other_cores=0.0)
