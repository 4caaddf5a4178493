"""Measure how long ``pageframe up`` takes: to its ready line, and to the first token after that.

    python -m bench.starting --starts 10
    python -m bench.starting --starts 10 --against FOLDER --output bench/results/starting.json

``FOLDER`` is another checkout of this project; its sources are started in turns with those here, by
the same interpreter and libraries. With other work beside, wall time says something only as a ratio
of turns; processor time says how much there is to do. Each start has a state folder of its own. The
first one of each checkout may have to compile, and does not count.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from pageframe.client import Delta, GenerationRequest, PageframeClient

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = ("kernels", "protos", "services", "shared")
SUPERVISOR = "up"
_READY = "pageframe ready grpc="
_NUM_METRICS_PORTS = 3
_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start.

    Attributes:
        ready_s: From the command to its ready line.
        first_token_s: From then to the first token of the first request.
        cpu_s: Processor time until the ready line, by process; all threads, user and system.
    """

    ready_s: float
    first_token_s: float
    cpu_s: Mapping[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 if a start took longer than was asked for."""
    options = _parse(arguments)
    checkouts = {"here": REPOSITORY}
    if options.against is not None:
        checkouts["against"] = options.against.resolve()
    starts: dict[str, list[Start]] = {name: [] for name in checkouts}
    for turn in range(-1, options.starts):
        for name, checkout in checkouts.items():
            start = measure(checkout, options.model, options.up)
            print(f"{'warming up' if turn < 0 else f'{turn + 1}'} {name}: {start}", file=sys.stderr)
            if turn >= 0:
                starts[name].append(start)
    document = {
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        # Without the folder that it lies in on this machine.
        "model": Path(options.model).name,
        "options": options.up,
        "checkouts": {name: summarise(of_one) for name, of_one in starts.items()},
    }
    text = json.dumps(document, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0 if all(start.ready_s <= options.ready_within for start in starts["here"]) else 1


def measure(checkout: Path, model: str, options: Sequence[str] = ()) -> Start:
    """Start a checkout once, ask it for a token, and stop it.

    Raises:
        RuntimeError: it did not start; with what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="pageframe-starting-") as folder:
        begin_s = time.monotonic()
        with _running(checkout, model, Path(folder), options) as (process, line):
            ready_s = time.monotonic()
            cpu_s = _processor_time(process.pid)
            _wait_token(line.removeprefix(_READY).split()[0])
            return Start(
                ready_s=ready_s - begin_s, first_token_s=time.monotonic() - ready_s, cpu_s=cpu_s
            )


def summarise(starts: Sequence[Start]) -> dict[str, object]:
    """Lowest, median and highest of each figure."""
    names = sorted({name for start in starts for name in start.cpu_s})
    return {
        "ready_s": _range([start.ready_s for start in starts]),
        "first_token_s": _range([start.first_token_s for start in starts]),
        "cpu_s": _range([sum(start.cpu_s.values()) for start in starts]),
        "cpu_s_by_process": {
            name: _range([start.cpu_s.get(name, 0.0) for start in starts]) for name in names
        },
    }


def _range(values: Sequence[float]) -> dict[str, float]:
    return {
        "min": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "max": round(max(values), 3),
    }


@contextmanager
def _running(
    checkout: Path, model: str, state_dir: Path, options: Sequence[str]
) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A started system and its ready line."""
    command = [sys.executable, "-P", "-m", "pageframe.cli", "up", "--model", model]
    command += ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    command += ["--metrics-port", str(_free_ports()), "--state-dir", str(state_dir), *options]
    errors_path = state_dir / "up.stderr"
    with errors_path.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=state_dir,
            env=environment(checkout, os.environ),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None, "a pipe was asked for"
        line = process.stdout.readline()
        if not line.startswith(_READY):
            raise RuntimeError(f"not ready: {line!r}\n{errors_path.read_text()}")
        yield process, line
    finally:
        process.terminate()
        process.wait(_STOP_TIMEOUT_S)


def environment(checkout: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """That of whoever measures, without settings, for the sources of a checkout."""
    # What is compiled anew by every process is not what a start takes.
    dropped = ("PAGEFRAME_", "OTEL_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in environ.items() if not name.startswith(dropped)}
    models_dir = environ.get("PAGEFRAME_MODELS_DIR")
    roots = os.pathsep.join(str(checkout / root) for root in SOURCE_ROOTS)
    chosen = {} if models_dir is None else {"PAGEFRAME_MODELS_DIR": models_dir}
    return kept | chosen | {"PYTHONPATH": roots}


def _processor_time(supervisor_pid: int) -> dict[str, float]:
    """Seconds of each process so far; a service is known by the module that it runs."""
    supervisor = psutil.Process(supervisor_pid)
    seconds = {SUPERVISOR: _cpu_s(supervisor)}
    for child in supervisor.children(recursive=True):
        modules = [word for word in child.cmdline() if word.startswith("pageframe.")]
        name = modules[0].removeprefix("pageframe.") if modules else child.name()
        seconds[name] = seconds.get(name, 0.0) + _cpu_s(child)
    return seconds


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _wait_token(address: str) -> None:
    with PageframeClient(address) as client:
        for event in client.generate(GenerationRequest(prompt="Once", max_tokens=1, seed=0)):
            if isinstance(event, Delta):
                return


def _free_ports() -> int:
    """The first of three ports that are free now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
        if all(_is_free(first + offset) for offset in range(_NUM_METRICS_PORTS)):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.starting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--starts", type=int, default=10, help="of each checkout; one more warms up"
    )
    parser.add_argument("--against", type=Path, help="another checkout, started in turns")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--ready-within", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--up", action="append", default=[], help="further word for `pageframe up`")
    parser.add_argument("--output", type=Path, help="write what is printed here as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
