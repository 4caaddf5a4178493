"""``pageframe up``: look first, prepare the model, then run all services until told to stop.

    settings ─▶ checks ─▶ model ─▶ run folder, launch file ─▶ supervisor ─▶ ready line ─▶ drain

Standard output gets one line, the last, as ``pageframe ready grpc=HOST:PORT http=HOST:PORT
kernels=fused``. Everything else is on standard error.
"""

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pageframe.cli.ahead import EXECUTOR, Ahead
from pageframe.cli.checks import (
    check_metrics_ports,
    check_port,
    check_writable,
    find_gpu_notice,
    find_memory_problems,
    find_problems,
    gather_facts,
)
from pageframe.cli.child import ReadyReport, ServiceSpec
from pageframe.cli.console import Console
from pageframe.cli.model_prepare import prepare_model, weights_size_bytes
from pageframe.cli.run_folder import make_run_folder
from pageframe.cli.services import count_threads, launch_paths, ring_paths, service_specs
from pageframe.cli.spawn import Spawned
from pageframe.cli.supervisor import NOTHING_STARTED, Supervisor
from pageframe.config import machine
from pageframe.config.launch import Launch
from pageframe.config.option_types import DtypeName, RunnerName
from pageframe.config.settings import Settings

LAUNCH_FILE_NAME = "launch.json"


def run_up(
    settings: Settings, environ: Mapping[str, str], console: Console, ahead: Ahead | None = None
) -> int:
    """Serve until a signal; returns the exit code.

    Args:
        settings: As a person chose them.
        environ: The environment.
        console: Shows what happens.
        ahead: The executor, if it has been started already.

    Raises:
        PageframeError: if something that a person can mend stands in the way; nothing has been
            started then.
    """
    _check_machine(settings, console)
    with console:
        needs_weights = settings.runner is not RunnerName.SIM
        model_path = prepare_model(settings.model, console, needs_weights=needs_weights)
        if needs_weights:
            check_memory(settings, model_path)
    run_dir = make_run_folder(settings.state_dir, environ)
    try:
        launch = Launch(
            settings=settings,
            model_path=model_path,
            run_dir=run_dir,
            num_threads=max(1, count_threads(settings, environ) // settings.replicas),
            supervisor_pid=os.getpid(),
        )
        launch_path = run_dir / LAUNCH_FILE_NAME
        for path, of_replica in launch_paths(launch, launch_path).items():
            of_replica.write(path)
        started: dict[str, Spawned] = {}
        if ahead is not None:
            ahead.tell(launch_path)
            started[EXECUTOR] = ahead.spawned
        specs = service_specs(launch, launch_path, environ)
        try:
            with console:
                return supervise(launch, launch_path, specs, console, started)
        finally:
            for path in ring_paths(launch):
                path.unlink(missing_ok=True)
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def supervise(
    launch: Launch,
    launch_path: Path,
    specs: Sequence[ServiceSpec],
    console: Console,
    started: Mapping[str, Spawned] = NOTHING_STARTED,
) -> int:
    """Run the services of a launch, some of them started already, by name.

    Prints the ready line when all of them are.
    """
    served: list[Launch] = []

    def on_ready(reports: Mapping[str, ReadyReport]) -> None:
        gateway = reports["gateway"]
        resolved = launch.with_addresses(grpc=gateway.address, http=gateway.details.get("http"))
        # A gateway that is started again must come back to the port that clients know.
        resolved.write(launch_path)
        resolved.publish_address()
        served.append(resolved)
        details = {
            name: value for report in reports.values() for name, value in report.details.items()
        }
        words = [f"grpc={gateway.address}", *(f"{name}={value}" for name, value in details.items())]
        print("pageframe ready", *words, flush=True)

    async def run() -> int:
        return await Supervisor(specs, console=console, on_ready=on_ready, started=started).run()

    try:
        return asyncio.run(run())
    finally:
        for resolved in served:
            resolved.withdraw_address()


def _check_machine(settings: Settings, console: Console) -> None:
    settings.check_tls()
    facts = gather_facts(settings)
    for problem in find_problems(facts, settings):
        raise problem
    check_port(settings.grpc, "grpc")
    if settings.http is not None:
        check_port(settings.http, "http")
    check_metrics_ports(settings)
    check_writable(settings.state_dir)
    if notice := find_gpu_notice(facts, settings):
        console.say(notice)


def check_memory(settings: Settings, model_path: Path) -> None:
    """Refuse what cannot fit into memory beside the model's weights.

    Raises:
        ResourceExhaustedError: ``MEMORY_TOO_SMALL``, with the numbers.
    """
    # Weights are stored in 16 bits by nearly everyone; fp32 takes them twice.
    factor = 2 if settings.dtype is DtypeName.FP32 else 1
    weights_bytes = factor * weights_size_bytes(model_path)
    available_bytes = machine.memory_available_bytes()
    for problem in find_memory_problems(available_bytes, weights_bytes, settings):
        raise problem
