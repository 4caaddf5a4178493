"""``pageframe bench``: measurements that anybody can repeat on their own machine."""

import asyncio
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import psutil
import typer

from pageframe.cli.console import open_console
from pageframe.cli.model_prepare import prepare_model
from pageframe.cli.services import count_threads
from pageframe.client import AsyncPageframeClient
from pageframe.config.launch import Launch
from pageframe.config.option_types import LogLevel, RunnerName
from pageframe.config.settings import Settings, load_settings
from pageframe.core.errors import UnavailableError
from pageframe.core.request import Delivery
from pageframe.core.trace import NullTraceSink, TraceMode
from pageframe.lab.bench_split import (
    Round,
    SplitReport,
    measure_split,
    through_client,
    through_service,
)
from pageframe.lab.in_process import in_process_system
from pageframe.lab.workload import WorkloadShape
from pageframe.telemetry.logs import configure

bench = typer.Typer(no_args_is_help=True, help="Measure this machine.")

_SERVICE_OF_MODULE = re.compile(r"pageframe\.(gateway|scheduler|executor|telemetry)$")
_READY_LINE = re.compile(r"pageframe ready grpc=(\S+)")
_STOP_TIMEOUT_S = 30
# Both sides rest when they took no more than so much processor time in so long.
_REST_CPU_S = 0.03
_REST_S = 0.3
_NUM_RESTS_MAX = 100

_MODEL_SHAPE = WorkloadShape(num_requests=64, num_prompt_tokens=(8, 96), num_output_tokens=(16, 48))
_SIM_SHAPE = WorkloadShape(
    num_requests=64, num_prompt_tokens=(16, 16), num_output_tokens=(512, 512)
)


@bench.callback()
def main() -> None:
    """Measure this machine."""


@bench.command()
def split(
    sim: Annotated[
        bool, typer.Option("--sim", help="Steps of 2 ms and no model, so nothing hides the cost.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs to measure.")] = 5,
    model: Annotated[str, typer.Option(help="Name, folder or Hugging Face id.")] = "",
    dtype: Annotated[str, typer.Option(help="Type of weights.")] = "auto",
    trace: Annotated[
        TraceMode, typer.Option(help="Of the three processes; the one process traces nothing.")
    ] = TraceMode.OFF,
    final: Annotated[
        bool, typer.Option("--final", help="Ask for whole answers, not for each token as it comes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare three processes with the same code in one process, interleaved.

    Prints the ratio of output tokens per second and the processor time of each service per token.
    Both sides write the same log lines, to files. What tracing costs is a question of its own,
    which ``--trace all`` adds to this one.
    """
    delivery = Delivery.FINAL if final else Delivery.EVERY_TOKEN
    flags: dict[str, object] = {"grpc": "127.0.0.1:0", "http": "off", "metrics-port": 0}
    flags |= {"dtype": dtype, "model": model or None, "trace": trace.value}
    if sim:
        flags |= {"runner": "sim", "sim-step": "2ms"}
    settings = load_settings(flags, os.environ)
    with tempfile.TemporaryDirectory(prefix="pageframe-bench-") as folder:
        state_dir = Path(folder)
        settings = settings.model_copy(update={"state_dir": state_dir})
        with _logs_in(state_dir / "one-process.log", settings.log_level):
            report = asyncio.run(_measure(settings, delivery, rounds, state_dir))
    if as_json:
        asked = {"trace": trace.value, "delivery": delivery.name.lower()}
        print(json.dumps({**asked, **report.to_json()}))
    else:
        _print_report(report)


async def _measure(
    settings: Settings, delivery: Delivery, num_rounds: int, state_dir: Path
) -> SplitReport:
    is_sim = settings.runner is RunnerName.SIM
    console = open_console()
    with console:
        folder = prepare_model(settings.model, console, needs_weights=not is_sim)
    launch = Launch(
        settings=settings,
        model_path=folder,
        run_dir=state_dir,
        num_threads=count_threads(settings, os.environ),
        supervisor_pid=os.getpid(),
    )
    with _three_processes(settings) as (address, supervisor):
        async with (
            AsyncPageframeClient(address) as client,
            in_process_system(launch, NullTraceSink()) as service,
        ):
            return await measure_split(
                through_client(client, delivery),
                through_service(service, delivery),
                shape=_SIM_SHAPE if is_sim else _MODEL_SHAPE,
                vocab_size=service.facts.vocab_size,
                num_rounds=num_rounds,
                cpu_seconds=lambda: _cpu_seconds(supervisor),
                rest=lambda: _until_rest(supervisor),
                on_round=_report_round,
            )


@contextmanager
def _logs_in(path: Path, level: LogLevel) -> Iterator[None]:
    """Write this process's log as a service does, while the block runs; then only trouble."""
    with path.open("w") as log:
        configure("pageframe-bench", level.value, stream=log)
        try:
            yield
        finally:
            configure("pageframe-bench", LogLevel.WARNING.value)


@contextmanager
def _three_processes(settings: Settings) -> Iterator[tuple[str, psutil.Process]]:
    """Serve in processes of their own while the block runs; yields address and supervisor."""
    overrides = settings.model_dump(mode="json", by_alias=True, exclude_none=True)
    arguments = []
    for option, value in overrides.items():
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments.append(f"--{option}={value}")
    command = [sys.executable, "-m", "pageframe.cli", "up", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None, "a pipe was asked for"
        found = _READY_LINE.match(process.stdout.readline())
        if found is None:
            raise UnavailableError("NOT_READY", "the server did not start; its own words say why")
        yield found.group(1), psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _cpu_seconds(supervisor: psutil.Process) -> Mapping[str, float]:
    """Processor time so far of each service, and of this process, which is the client."""
    own = psutil.Process().cpu_times()
    seconds = {"client": own.user + own.system}
    for child in supervisor.children():
        for part in child.cmdline():
            if found := _SERVICE_OF_MODULE.match(part):
                times = child.cpu_times()
                seconds[found.group(1)] = times.user + times.system
    return seconds


async def _until_rest(supervisor: psutil.Process) -> None:
    """Wait until neither side takes processor time any more; not for ever."""
    last_s = -math.inf
    for _ in range(_NUM_RESTS_MAX):
        total_s = sum(_cpu_seconds(supervisor).values())
        if total_s <= last_s + _REST_CPU_S:
            return
        last_s = total_s
        await asyncio.sleep(_REST_S)


def _report_round(index: int, entry: Round) -> None:
    figures = dataclasses.astuple(entry)
    print(
        f"round {index}: {figures[0]:.0f} tokens/s in three processes, "
        f"{figures[1]:.0f} in one, ratio {entry.ratio:.3f}",
        file=sys.stderr,
    )


def _print_report(report: SplitReport) -> None:
    print(f"ratio {report.ratio:.3f}")
    for service, cpu_us in report.cpu_us_per_token.items():
        print(f"{service:<10} {cpu_us:8.1f} us of processor time per token")
