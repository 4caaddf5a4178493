"""Is the trace complete? Runs a mixed load, then rebuilds the pool from exported spans alone.

    python -m bench.trace_audit [--requests 500] [--seed 1] [--output FILE]

A whole ``pageframe up`` on the simulated runner, under ``--trace audit``, in a pool that is far too
small: shared prompts, several samples (forks), chats (sessions), cancels, preemptions by swap,
evictions into a host tier, a resize down and up again. When all requests are over, the pool shows
itself (``Snapshot``); then the system ends, and the spans it has left are replayed by code that
shares nothing with the pool's. The verdict is ``complete`` if

- operation numbers run from 1 without a gap,
- every operation follows from those before it,
- the rebuilt pool equals the snapshot, block for block, reference for reference, and
- each kind of operation that the load is made for was really seen.

Exits 0 only then, 1 otherwise.
"""

import argparse
import collections
import json
import random
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress

from pageframe.client import GenerationRequest, PageframeClient
from pageframe.client.kv_memory import KvMemoryClient
from pageframe.core.errors import PageframeError
from pageframe.core.trace import KvOperation
from pageframe.telemetry.pool_rebuild import RebuiltPool
from pageframe.telemetry.reader import read_spans
from pageframe.wire.memory_facts import BLOCK_STATE_NAMES, MemorySnapshot

NUM_BLOCKS = 96
NUM_BLOCKS_SHRUNK = 64
BLOCK_SIZE = 16
HOST_KV_MEMORY = "64MiB"
NUM_AT_ONCE = 24
PATIENCE_S = 120.0
PREFIX_TOKENS = 40

WANTED = (
    KvOperation.ALLOCATE,
    KvOperation.SHARE,
    KvOperation.COPY_ON_WRITE,
    KvOperation.RELEASE,
    KvOperation.FREE,
    KvOperation.INDEX,
    KvOperation.EVICT,
    KvOperation.DEMOTE,
    KvOperation.PROMOTE,
    KvOperation.SWAP_OUT,
    KvOperation.SWAP_IN,
    KvOperation.PIN,
    KvOperation.UNPIN,
    KvOperation.MOVE,
    KvOperation.RESIZE,
)
"""What the load is made to bring about."""


@dataclass(slots=True)
class Verdict:
    """What came out.

    Attributes:
        num_requests: Requests that were run.
        num_cancelled: How many of them were taken back.
        num_operations: Operations up to the snapshot.
        operations: How often each kind was seen.
        faults: What does not fit together; empty when the trace is complete.
    """

    num_requests: int
    num_cancelled: int = 0
    num_operations: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing and nothing contradicts."""
        return not self.faults


class RunningSystem:
    """A ``pageframe up`` of its own; a context manager that ends it in good order."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self._model = model

    def __enter__(self) -> Self:
        """Start it and wait until it serves."""
        command = [str(Path(sys.executable).with_name("pageframe")), "up"]
        command += ["--model", str(self._model), "--runner", "sim", "--sim-step", "2ms"]
        command += ["--grpc", "127.0.0.1:0", "--http", "off", "--metrics-port", "0"]
        command += ["--state-dir", str(self.folder), "--trace", "audit"]
        command += ["--num-blocks", str(NUM_BLOCKS), "--block-size", str(BLOCK_SIZE)]
        command += ["--host-kv-memory", HOST_KV_MEMORY, "--recovery", "swap"]
        command += ["--session-idle", "1", "--max-num-sequences", "32"]
        self._log = (self.folder / "up.log").open("w")
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=self.folder
        )
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
        line = self._process.stdout.readline() if readable else ""
        if not line.startswith("pageframe ready grpc="):
            self._process.kill()
            raise SystemExit(f"it did not start: {line!r}, see {self.folder / 'up.log'}")
        self.address = line.removeprefix("pageframe ready grpc=").split()[0]
        (socket,) = (self.folder / "run").glob("*/executor.sock")
        self.executor_address = f"unix:{socket}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ask it to end and wait; everything is traced then."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(PATIENCE_S)
        self._log.close()


def make_requests(num_requests: int, seed: int, vocab_size: int) -> list[GenerationRequest]:
    """A mixed load; the same for the same seed."""
    dice = random.Random(seed)
    prefixes = [[dice.randrange(2, vocab_size) for _ in range(PREFIX_TOKENS)] for _ in range(6)]
    requests = []
    for number in range(num_requests):
        own = [dice.randrange(2, vocab_size) for _ in range(dice.randint(1, 60))]
        common = dice.choice(prefixes) if dice.random() < 0.6 else []
        requests.append(
            GenerationRequest(
                token_ids=[*common, *own],
                num_samples=dice.choice([1, 1, 1, 2, 3, 4]),
                max_tokens=dice.randint(1, 90),
                ignore_eos=True,
                session_id=f"chat-{dice.randrange(8)}" if dice.random() < 0.2 else "",
                request_id=f"audit-{number}",
                seed=number,
            )
        )
    return requests


def run_load(
    client: PageframeClient,
    memory: KvMemoryClient,
    requests: Sequence[GenerationRequest],
    verdict: Verdict,
    progress: Progress,
) -> None:
    """Run all requests, cancel some of them, and resize the pool on the way."""
    dice = random.Random(len(requests))
    task = progress.add_task("requests", total=len(requests))

    def one(request: GenerationRequest) -> None:
        is_unwanted = dice.random() < 0.1
        try:
            for event in client.generate(request, timeout_s=PATIENCE_S):
                if is_unwanted and hasattr(event, "token_ids"):
                    client.cancel(request.request_id)
                    is_unwanted = False
                    verdict.num_cancelled += 1
        except PageframeError as error:
            if error.status not in ("CANCELLED", "NOT_FOUND"):
                verdict.faults.append(f"request {request.request_id}: {error}")
        progress.advance(task)

    with ThreadPoolExecutor(NUM_AT_ONCE) as threads:
        list(threads.map(one, requests[: len(requests) // 2]))
    memory.resize(NUM_BLOCKS_SHRUNK)
    with ThreadPoolExecutor(NUM_AT_ONCE) as threads:
        running = [threads.submit(one, request) for request in requests[len(requests) // 2 :]]
        memory.resize(NUM_BLOCKS)
        for future in running:
            future.result()


def compare(rebuilt: RebuiltPool, snapshot: MemorySnapshot) -> list[str]:
    """Where they differ, one sentence each."""
    faults = []
    if rebuilt.last_number != snapshot.operation:
        faults.append(
            f"the trace ends at operation {rebuilt.last_number}, the pool was at "
            f"{snapshot.operation}"
        )
    if sorted(rebuilt.blocks) != list(range(snapshot.account.total)):
        faults.append(f"{len(rebuilt.blocks)} blocks were rebuilt of {snapshot.account.total}")
        return faults
    for block_id, block in sorted(rebuilt.blocks.items()):
        told = (
            BLOCK_STATE_NAMES[snapshot.states[block_id]],
            int(snapshot.ref_counts[block_id]),
            int(snapshot.pin_counts[block_id]),
            bool(snapshot.is_indexed[block_id]),
        )
        found = (block.state, block.num_references, block.num_pins, block.is_indexed)
        if found != told:
            faults.append(f"block {block_id} was rebuilt as {found}, and is {told}")
    return faults


def audit(num_requests: int, seed: int, model: Path, progress: Progress) -> Verdict:
    """Run the load and judge its trace."""
    verdict = Verdict(num_requests)
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="pageframe-audit-") as name:
        folder = Path(name)
        with (
            RunningSystem(folder, model) as system,
            PageframeClient(system.address) as client,
            KvMemoryClient(system.executor_address) as memory,
        ):
            requests = make_requests(num_requests, seed, vocab_size)
            run_load(client, memory, requests, verdict, progress)
            snapshot = memory.snapshot()
        spans = read_spans(folder / "traces")
    rebuilt = RebuiltPool.of(spans, up_to=snapshot.operation)
    verdict.num_operations = rebuilt.last_number
    verdict.faults += rebuilt.faults[:20]
    verdict.faults += compare(rebuilt, snapshot)[:20]
    seen = collections.Counter(span.name for span in spans if span.name.startswith("kv."))
    verdict.operations = dict(sorted(seen.items()))
    missing = [it.span_name for it in WANTED if not seen[it.span_name]]
    if missing:
        verdict.faults.append(f"the load brought about none of {', '.join(missing)}")
    return verdict


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description="Rebuild the pool from its trace alone.")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, required=True, help="a prepared model's folder")
    parser.add_argument("--output", type=Path, help="write the verdict here as JSON")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        verdict = audit(arguments.requests, arguments.seed, arguments.model, progress)
    document = json.dumps(asdict(verdict) | {"is_complete": verdict.is_complete}, indent=2)
    print(document)
    if arguments.output is not None:
        arguments.output.write_text(document + "\n", encoding="utf-8")
    return 0 if verdict.is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
