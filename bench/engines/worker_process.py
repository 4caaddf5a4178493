"""An engine in a process of its own, and what the machine does beside it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from bench.engines.workloads import Workload

WORKERS = Path(__file__).with_name("workers")
PEER_KINDS = ("openai", "openvino", "transformers", "vllm")
_STOP_TIMEOUT_S = 60
# At rest is who takes no more than 4 % of a processor.
_REST_S = 0.5
_REST_CPU_S = 0.02
_REST_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """An engine to measure.

    Attributes:
        name: In the table.
        kind: Which worker drives it, ``run_KIND.py``.
        python: Interpreter of the environment that it is installed in.
        environment: What the worker shall see beside the usual.
    """

    name: str
    kind: str
    python: str
    environment: Mapping[str, str]

    @property
    def is_served(self) -> bool:
        """Whether it computes in other processes than the one that asks it."""
        return self.kind in ("served", "openai") or self.environment.get("ENGINE_SPLIT") == "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One workload done once.

    Attributes:
        wall_s: From handing all requests in until the last is done, seen inside the worker.
        num_wrong: Samples that are not as long as was asked.
        own_cores: Processor time of the worker and its children over ``wall_s``.
        other_cores: The same of everything else on the machine.
    """

    wall_s: float
    num_wrong: int
    own_cores: float
    other_cores: float


class WorkerProcess:
    """A running worker; a context manager that ends it.

    Attributes:
        peer: Which engine.
        start_s: From starting the process until it was ready.
        versions: What it said of itself.
    """

    def __init__(self, peer: Peer, *, model: str, dtype: str, num_threads: int, log: Path) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(num_threads),
            "ENGINE_MODEL": model,
            "ENGINE_DTYPE": dtype,
            **peer.environment,
        }
        self.peer = peer
        self._log = log
        started = time.perf_counter()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [peer.python, str(WORKERS / f"run_{peer.kind}.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )
        self.versions: dict[str, str] = self._read()["versions"]
        self.start_s = time.perf_counter() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None, "a pipe was asked for"
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def rest(self) -> None:
        """Wait until the engine does nothing any more, to what clocks can tell; not for ever.

        What one still does behind its own turn would fall into the next engine's.
        """
        last_s = -1.0
        end = time.monotonic() + _REST_TIMEOUT_S
        while (own_s := self._cpu_s()[1]) > last_s + _REST_CPU_S and time.monotonic() < end:
            last_s = own_s
            time.sleep(_REST_S)

    def measure(self, workload: Workload) -> Measurement:
        """Do ``workload`` once.

        Raises:
            RuntimeError: the worker died; its log says why.
        """
        assert self._process.stdin is not None, "a pipe was asked for"
        before = self._cpu_s()
        self._process.stdin.write(json.dumps(workload.to_json()) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        after = self._cpu_s()
        wall_s = float(answer["wall_s"])
        own_s = after[1] - before[1]
        return Measurement(
            wall_s=wall_s,
            num_wrong=_count_wrong(workload, answer["lengths"]),
            own_cores=own_s / wall_s,
            other_cores=max(0.0, after[0] - before[0] - own_s) / wall_s,
        )

    def _read(self) -> Any:
        assert self._process.stdout is not None, "a pipe was asked for"
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(errors="replace").splitlines()[-5:]
            raise RuntimeError(f"{self._log}: " + " | ".join(tail))
        return json.loads(line)

    def _cpu_s(self) -> tuple[float, float]:
        """Processor seconds so far: of the whole machine, and of the worker with its children."""
        whole = psutil.cpu_times()
        busy = whole.user + whole.nice + whole.system + whole.irq + whole.softirq
        own = 0.0
        worker = psutil.Process(self._process.pid)
        for process in [worker, *worker.children(recursive=True)]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            own += times.user + times.system
        return busy, own


def own_engines() -> list[Peer]:
    """Pageframe itself: in one process, and as it is served."""
    return [
        Peer(name=f"pageframe, {how}", kind=kind, python=sys.executable, environment={})
        for kind, how in (("ours", "one process"), ("served", "served"))
    ]


def _count_wrong(workload: Workload, lengths: list[list[int]]) -> int:
    assert len(lengths) == len(workload.requests), f"{len(lengths)} answers"
    num_wrong = 0
    for request, found in zip(workload.requests, lengths, strict=True):
        wanted = [request.num_output_tokens] * workload.num_samples
        num_wrong += sum(a != b for a, b in zip(found, wanted, strict=True))
    return num_wrong
