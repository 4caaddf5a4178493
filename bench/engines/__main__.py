"""Compare engines on this machine, the same requests in turns.

    python -m bench.engines --model FOLDER [--dtype bfloat16] [--workloads ABCDE] [--repetitions 3]
        [--peer vllm=PYTHON] [--peer-environment vllm:NAME=VALUE] [--output FILE]

Every engine is a process that is up all the time and idle while another works. In each repetition
all of them do the same requests, each time in another order; the first repetition warms up and does
not count. The next turn begins when the engine of the last one has come to rest. A turn beside
which other processes used more than 0.15 cores is done again, at most twice. Peers are installed by
whoever measures, in environments of their own: ``--peer`` names an engine and its interpreter,
``openvino``, ``openai``, ``transformers`` or ``vllm``, with a name of its own behind a colon where
one engine is measured in two ways (``vllm:vllm-split=PYTHON``).
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bench.engines.report import Row, as_table, summarise
from bench.engines.worker_process import PEER_KINDS, Measurement, Peer, WorkerProcess, own_engines
from bench.engines.workloads import NAMES, Workload, attempts, first_token_of, make_workload

_OTHER_CORES_MAX = 0.15
_TRIES_MAX = 3


def main() -> int:
    """Run; 1 if an engine made a sample of a wrong length."""
    options = _parse()
    config = json.loads((Path(options.model) / "config.json").read_text())
    rows: list[Row] = []
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pageframe-bench-")))
        workers: dict[str, WorkerProcess] = {}
        for peer in [*own_engines(), *options.peers]:
            _say(f"starting {peer.name}")
            worker = WorkerProcess(
                peer,
                model=options.model,
                dtype=options.dtype,
                num_threads=options.threads,
                log=logs / f"{len(workers)}.log",
            )
            workers[peer.name] = stack.enter_context(worker)
            _say(f"{peer.name} is ready after {worker.start_s:.1f} s")
        for name in options.workloads:
            rows += _measure(workers, name, options.repetitions, int(config["vocab_size"]))
    print(as_table(rows))
    if options.output:
        result = {
            "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.platform()}",
            "dtype": options.dtype,
            "num_threads": options.threads,
            "engines": {
                name: {"versions": worker.versions, "start_s": round(worker.start_s, 2)}
                for name, worker in workers.items()
            },
            "rows": [row.to_json() for row in rows],
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row.num_wrong for row in rows))


def _measure(
    workers: dict[str, WorkerProcess], name: str, num_repetitions: int, vocab_size: int
) -> list[Row]:
    """All repetitions of one workload; a row for each engine."""
    turns: dict[str, list[Measurement]] = {engine: [] for engine in workers}
    first_tokens: dict[str, list[Measurement]] = {engine: [] for engine in workers}
    for repetition in range(num_repetitions + 1):
        for engine in _rotated(list(workers), repetition):
            worker = workers[engine]
            if name == "E":
                lone = map(first_token_of, attempts(name, repetition, vocab_size))
                first_tokens[engine].append(_turn(worker, lone))
            turns[engine].append(_turn(worker, attempts(name, repetition, vocab_size)))
            _say(
                f"{name} {repetition}/{num_repetitions} {engine}: {turns[engine][-1].wall_s:.2f} s"
            )
    workload = make_workload(name, 0, vocab_size)
    return [
        summarise(worker.peer, workload, turns[engine][1:], first_tokens[engine][1:])
        for engine, worker in workers.items()
    ]


def _turn(worker: WorkerProcess, workloads: Iterator[Workload]) -> Measurement:
    """One quiet measurement; the quietest of some where none was.

    Each takes the next workload: an engine that keeps prompts would find them when asked again.
    """
    tries: list[Measurement] = []
    while len(tries) < _TRIES_MAX:
        tries.append(worker.measure(next(workloads)))
        worker.rest()
        if tries[-1].other_cores <= _OTHER_CORES_MAX:
            break
    return min(tries, key=lambda measurement: measurement.other_cores)


def _rotated(engines: list[str], turn: int) -> list[str]:
    first = turn % len(engines)
    return engines[first:] + engines[:first]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare engines on this machine.")
    parser.add_argument("--model", required=True, help="folder in Hugging Face form")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--workloads", default=NAMES, help="of ABCDE")
    parser.add_argument("--repetitions", type=int, default=3, help="that count")
    parser.add_argument("--peer", action="append", default=[], metavar="KIND[:NAME]=PYTHON")
    parser.add_argument(
        "--peer-environment", action="append", default=[], metavar="NAME:VARIABLE=VALUE"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(NAMES):
        parser.error(f"there is no workload {', '.join(sorted(unknown))}; {NAMES} are")
    try:
        options.peers = _peers(options.peer, options.peer_environment)
    except ValueError as error:
        parser.error(str(error))
    return options


def _peers(asked: list[str], environment: list[str]) -> list[Peer]:
    variables: dict[str, dict[str, str]] = {}
    for entry in environment:
        name, _, assignment = entry.partition(":")
        variable, _, value = assignment.partition("=")
        variables.setdefault(name, {})[variable] = value
    peers = []
    for entry in asked:
        what, _, python = entry.partition("=")
        kind, _, name = what.partition(":")
        if kind not in PEER_KINDS or not python:
            raise ValueError(f"--peer {entry}: wanted KIND=PYTHON with {', '.join(PEER_KINDS)}")
        name = name or kind
        peers.append(Peer(name=name, kind=kind, python=python, environment=variables.pop(name, {})))
    if variables:
        raise ValueError(f"--peer-environment for {', '.join(variables)}, which is no peer")
    return peers


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
