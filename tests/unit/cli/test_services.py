"""What the processes of a system are told on their command lines."""

import asyncio
import os
import signal
from pathlib import Path

from pageframe.cli.child import Child
from pageframe.cli.services import EXPORTER, launch_paths, ring_paths, service_specs
from pageframe.config.launch import Launch
from pageframe.config.settings import load_settings
from pageframe.telemetry.__main__ import parse_arguments


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def test_the_size_of_the_spool_reaches_the_exporter(tmp_path):
    settings = load_settings({"spool-size": "3MiB", "state-dir": str(tmp_path)}, {})
    launch = Launch(
        settings=settings,
        model_path=tmp_path,
        run_dir=tmp_path,
        num_threads=1,
        supervisor_pid=os.getpid(),
    )
    specs = {
        spec.name: spec for spec in service_specs(launch, tmp_path / "launch.json", os.environ)
    }

    async def run() -> list[str]:
        child = Child.start(specs[EXPORTER], lambda *_: None, lambda _: None)
        try:
            return command_line(child.process.pid)
        finally:
            # It ends by itself: the signal waits until it can act on it.
            child.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(asyncio.shield(child.exited), 60) == 0

    arguments = asyncio.run(run())
    told = parse_arguments(arguments[arguments.index("pageframe.telemetry") + 1 :])
    assert told.spool_bytes == 3 << 20
    assert told.state_dir == tmp_path


def test_replicas_share_a_gateway_and_nothing_else(tmp_path):
    settings = load_settings(
        {"replicas": "2", "record": str(tmp_path / "run.pfj"), "state-dir": str(tmp_path)}, {}
    )
    launch = Launch(
        settings=settings, model_path=tmp_path, run_dir=tmp_path, num_threads=1, supervisor_pid=1
    )
    first_path, second_path = tmp_path / "launch.json", tmp_path / "launch-1.json"
    specs = {spec.name: spec for spec in service_specs(launch, first_path, os.environ)}
    names = ["gateway", "scheduler", "executor", "scheduler-1", "executor-1"]
    assert list(specs) == [*names, EXPORTER]
    told = {name: Path(specs[name].argv[-1]) for name in names}
    assert told == dict(zip(names, [*[first_path] * 3, *[second_path] * 2], strict=True))
    assert len({spec.log_path for spec in specs.values()}) == len(specs)
    assert {str(path) for path in ring_paths(launch)} <= set(specs[EXPORTER].argv)
    assert len(set(ring_paths(launch))) == len(names)
    first, second = launch_paths(launch, first_path).values()
    assert first is launch
    assert first.scheduler_targets == (first.scheduler_address, second.scheduler_address)
    assert first.executor_address != second.executor_address
    assert second.settings.record == tmp_path / "run-1.pfj"
    ports = [
        of_replica.settings.metrics_port_of(service)
        for of_replica in (first, second)
        for service in ("scheduler", "executor")
    ]
    assert ports == [9465, 9466, 9467, 9468]
