"""``pageframe serve``: one service and its exporter, for machines and containers of its own.

    settings ─▶ checks ─▶ model (executor) ─▶ run folder, launch file ─▶ supervisor ─▶ ready line

``pageframe up`` starts all services on one machine, where they meet at Unix sockets. Here each is
started by somebody else (Docker, systemd), and they meet at the addresses that are given. The same
supervisor keeps the service: one that dies is started again beside an exporter that lives on, so
its last spans are not lost with it.
"""

import asyncio
import dataclasses
import enum
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pageframe.cli.checks import (
    check_writable,
    find_gpu_notice,
    find_problems,
    gather_facts,
)
from pageframe.cli.child import ReadyReport, ServiceSpec
from pageframe.cli.console import Console
from pageframe.cli.model_prepare import prepare_model
from pageframe.cli.run_folder import make_run_folder
from pageframe.cli.services import count_threads, specs_apart
from pageframe.cli.supervisor import Supervisor
from pageframe.cli.up import LAUNCH_FILE_NAME, check_memory
from pageframe.config.launch import Launch
from pageframe.config.option_types import RunnerName
from pageframe.config.settings import Settings
from pageframe.config.values import parse_host_port, parse_targets
from pageframe.core.errors import InvalidRequestError


@enum.unique
class ServiceName(enum.StrEnum):
    """What can be served alone."""

    GATEWAY = "gateway"
    SCHEDULER = "scheduler"
    EXECUTOR = "executor"


# Which addresses a service has to be told. The gateway listens where its settings say.
_NEEDED = {
    ServiceName.GATEWAY: ("scheduler",),
    ServiceName.SCHEDULER: ("listen", "executor"),
    ServiceName.EXECUTOR: ("listen",),
}
# The pool page asks an executor; a gateway serves without it.
_KNOWN = {**_NEEDED, ServiceName.GATEWAY: ("scheduler", "executor")}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where services that run apart meet, each ``HOST:PORT``; empty for what was not given.

    Attributes:
        listen: Where this service listens.
        executor: Where the executor is reached; for a gateway, which shows their pools, all of
            them, as ``scheduler``.
        scheduler: Where the schedulers are reached, with commas in between; ``dns:///NAME:PORT``
            for all addresses of a name.
    """

    listen: str = ""
    executor: str = ""
    scheduler: str = ""

    def check(self, service: ServiceName) -> None:
        """Refuse what does not fit the service.

        Raises:
            InvalidRequestError: ``ADDRESS_MISSING``, ``ADDRESS_UNWANTED`` or ``SETTING_MALFORMED``.
        """
        for field in dataclasses.fields(self):
            address: str = getattr(self, field.name)
            if not address and field.name in _NEEDED[service]:
                raise InvalidRequestError(
                    "ADDRESS_MISSING", f"serve {service} needs --{field.name} HOST:PORT"
                )
            if address and field.name not in _KNOWN[service]:
                raise InvalidRequestError(
                    "ADDRESS_UNWANTED", f"serve {service} knows no --{field.name}"
                )
            if address:
                _check_address(service, field.name, address)


def _check_address(service: ServiceName, option: str, address: str) -> None:
    try:
        # A gateway may have several replicas, and find them by a name.
        parse_targets(address) if service is ServiceName.GATEWAY else parse_host_port(address)
    except ValueError as error:
        raise InvalidRequestError(
            "SETTING_MALFORMED", f"malformed setting --{option}: {address!r} {error}"
        ) from None


def run_serve(
    service: ServiceName,
    addresses: Addresses,
    settings: Settings,
    environ: Mapping[str, str],
    console: Console,
) -> int:
    """Serve until a signal; returns the exit code.

    Raises:
        PageframeError: if something that a person can mend stands in the way; nothing has been
            started then.
    """
    addresses.check(service)
    settings.check_tls()
    check_writable(settings.state_dir)
    model_path = Path()
    if service is ServiceName.EXECUTOR:
        with console:
            model_path = _prepare_executor(settings, console)
    run_dir = make_run_folder(settings.state_dir, environ)
    try:
        launch = make_launch(service, addresses, settings, environ, model_path, run_dir)
        launch_path = run_dir / LAUNCH_FILE_NAME
        launch.write(launch_path)
        specs = specs_apart(service.value, launch, launch_path, environ)
        try:
            with console:
                return _supervise(service, launch, launch_path, specs, console)
        finally:
            launch.remove_rings([service.value])
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def make_launch(
    service: ServiceName,
    addresses: Addresses,
    settings: Settings,
    environ: Mapping[str, str],
    model_path: Path,
    run_dir: Path,
) -> Launch:
    """What the service is told: where it listens is its own address, the others are as given."""
    listens = {f"{service}_at": addresses.listen} if addresses.listen else {}
    reached = {
        f"{name}_at": address
        for name, address in (("executor", addresses.executor), ("scheduler", addresses.scheduler))
        if address
    }
    return Launch.model_validate(
        {
            "settings": settings,
            "model_path": model_path,
            "run_dir": run_dir,
            "num_threads": count_threads(settings, environ),
            "supervisor_pid": os.getpid(),
            **listens,
            **reached,
        }
    )


def _prepare_executor(settings: Settings, console: Console) -> Path:
    facts = gather_facts(settings)
    for problem in find_problems(facts, settings):
        raise problem
    if notice := find_gpu_notice(facts, settings):
        console.say(notice)
    needs_weights = settings.runner is not RunnerName.SIM
    model_path = prepare_model(settings.model, console, needs_weights=needs_weights)
    if needs_weights:
        check_memory(settings, model_path)
    return model_path


def _supervise(
    service: ServiceName,
    launch: Launch,
    launch_path: Path,
    specs: list[ServiceSpec],
    console: Console,
) -> int:
    served: list[Launch] = []

    def on_ready(reports: Mapping[str, ReadyReport]) -> None:
        report = reports[service.value]
        words = [f"service={service}", f"grpc={report.address}"]
        words += [f"{name}={value}" for name, value in report.details.items()]
        if service is ServiceName.GATEWAY:
            resolved = launch.with_addresses(grpc=report.address, http=report.details.get("http"))
            # A gateway that is started again must come back to the port that clients know.
            resolved.write(launch_path)
            resolved.publish_address()
            served.append(resolved)
        print("pageframe ready", *words, flush=True)

    async def run() -> int:
        # Whoever keeps containers keeps their output too: every line of the service goes there.
        return await Supervisor(
            specs, console=console, on_ready=on_ready, summarise_line=_whole_line
        ).run()

    try:
        return asyncio.run(run())
    finally:
        for resolved in served:
            resolved.withdraw_address()


def _whole_line(_service: str, line: bytes) -> str | None:
    return line.decode(errors="replace").rstrip("\n") or None
