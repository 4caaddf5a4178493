"""The processes of one system: how each is called, and with which environment."""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from pageframe.cli.child import ServiceSpec
from pageframe.cli.spawn import module_command
from pageframe.config.launch import Launch, process_name
from pageframe.config.settings import Settings
from pageframe.config.variables import num_threads_unless_set, service_environment
from pageframe.core.trace import TraceMode
from pageframe.telemetry.supervise import EXPORTER_MODULE, exporter_arguments

# In the order in which they drain: whoever takes requests first, whoever only listens last.
TRACED_SERVICES = ("gateway", "scheduler", "executor")
EXPORTER = "exporter"
# A service drains within its own bound; past that and this it is not coming back.
_STOP_GRACE_SECONDS = 5.0
_EXPORTER_DRAIN_SECONDS = 10.0


def count_threads(settings: Settings, environ: Mapping[str, str]) -> int:
    """Threads for computing: as set, as OMP_NUM_THREADS says, or what the machine grants."""
    return settings.threads or num_threads_unless_set(environ)


def service_specs(
    launch: Launch, launch_path: Path, environ: Mapping[str, str]
) -> list[ServiceSpec]:
    """All processes of a launch, in the order in which they drain."""
    paths = launch_paths(launch, launch_path)
    specs = [
        _service(name, of_replica, path, environ)
        for path, of_replica in paths.items()
        for name in _traced_services(of_replica)
    ]
    if launch.settings.trace is not TraceMode.OFF:
        specs.append(_exporter(ring_paths(launch), launch, environ))
    return specs


def launch_paths(launch: Launch, launch_path: Path) -> dict[Path, Launch]:
    """The file by which each replica is told, and what it is told."""
    stem, suffix = launch_path.stem, launch_path.suffix
    return {
        launch_path.with_name(process_name(stem, of_replica.replica) + suffix): of_replica
        for of_replica in launch.of_replicas
    }


def ring_paths(launch: Launch) -> list[Path]:
    """The trace rings of all processes of a launch."""
    return [
        of_replica.ring_path(name)
        for of_replica in launch.of_replicas
        for name in _traced_services(of_replica)
    ]


def specs_apart(
    service: str, launch: Launch, launch_path: Path, environ: Mapping[str, str]
) -> list[ServiceSpec]:
    """One service and an exporter of its own, in the order in which they drain."""
    specs = [_service(service, launch, launch_path, environ)]
    if launch.settings.trace is not TraceMode.OFF:
        specs.append(_exporter([launch.ring_path(service)], launch, environ))
    return specs


def log_path(settings: Settings, service: str) -> Path:
    """Where a process's output goes."""
    return settings.state_dir / "logs" / f"{service}.log"


def _traced_services(launch: Launch) -> Sequence[str]:
    """All services for the first replica; the others share its gateway."""
    return TRACED_SERVICES[1:] if launch.replica else TRACED_SERVICES


def _service(
    service: str, launch: Launch, launch_path: Path, environ: Mapping[str, str]
) -> ServiceSpec:
    num_threads = launch.num_threads if service == "executor" else 1
    name = process_name(service, launch.replica)
    return ServiceSpec(
        name=name,
        argv=module_command(f"pageframe.{service}", "--settings", str(launch_path)),
        environ=service_environment(environ, num_threads),
        log_path=log_path(launch.settings, name),
        stop_timeout_seconds=launch.settings.drain_timeout_seconds + _STOP_GRACE_SECONDS,
    )


def _exporter(rings: list[Path], launch: Launch, environ: Mapping[str, str]) -> ServiceSpec:
    arguments = exporter_arguments(
        rings,
        launch.settings.state_dir,
        parent_pid=launch.supervisor_pid,
        drain_seconds=_EXPORTER_DRAIN_SECONDS,
        is_lossless=launch.settings.trace is TraceMode.AUDIT,
        spool_bytes_max=launch.settings.spool_size_bytes,
    )
    return ServiceSpec(
        name=EXPORTER,
        argv=module_command(EXPORTER_MODULE, *arguments),
        environ=service_environment(environ, 1),
        log_path=log_path(launch.settings, EXPORTER),
        stop_timeout_seconds=_EXPORTER_DRAIN_SECONDS + _STOP_GRACE_SECONDS,
        reports_ready=False,
        # It may still write out what the rings hold.
        death_signal=signal.SIGTERM,
        unblocks_signals=True,
    )
