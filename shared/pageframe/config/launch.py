"""What the supervisor decided, handed to its children as one file.

A file, not flags: nothing of it shows in the process list, and every service reads the same.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from pageframe.config.settings import Settings
from pageframe.config.values import parse_targets
from pageframe.telemetry.ring_path import ring_path

# In the state folder while a system is ready: where client commands find it.
ADDRESS_FILE_NAME = "address.json"


def process_name(service: str, replica: int) -> str:
    """What the process of a service is called: of the first replica as the service, else numbered.

    The gateway is everybody's.
    """
    return f"{service}-{replica}" if replica and service != "gateway" else service


class Launch(BaseModel):
    """Settings after every "choose for me" that the supervisor can answer.

    Attributes:
        settings: As a person chose them; ``grpc`` has its real port once it is known.
        model_path: Hugging Face folder of the model.
        run_dir: Folder of this run, private to the user: Unix sockets, and trace rings where there
            is no shared memory.
        num_threads: CPU threads for computing, at least 1, within the cgroup's quota.
        supervisor_pid: Process that started the services.
        executor_at: Where the executor listens or is reached, ``HOST:PORT``, when the services run
            apart from one another; empty for a socket in the run folder. For a gateway all of its
            executors, with commas in between, among which may be ``dns:///NAME:PORT``.
        scheduler_at: The same for the scheduler; for a gateway all of its schedulers, with commas
            in between, among which may be ``dns:///NAME:PORT``.
        replica: Which of the replicas that start together this is for, from 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    settings: Settings
    model_path: Path
    run_dir: Path
    num_threads: int
    supervisor_pid: int
    executor_at: str = ""
    scheduler_at: str = ""
    replica: int = 0

    @property
    def executor_address(self) -> str:
        """Target of the executor's gRPC channel; a Unix socket in the run folder, unless given."""
        return self.executor_at or self._socket_target(process_name("executor", self.replica))

    @property
    def scheduler_address(self) -> str:
        """Target of the scheduler's gRPC channel; a Unix socket in the run folder, unless given."""
        return self.scheduler_at or self._socket_target(process_name("scheduler", self.replica))

    @property
    def executor_targets(self) -> tuple[str, ...]:
        """Where a gateway, and who looks at pools, find the executors of all replicas."""
        if self.executor_at:
            return parse_targets(self.executor_at)
        replicas = range(self.settings.replicas)
        return tuple(self._socket_target(process_name("executor", it)) for it in replicas)

    @property
    def scheduler_targets(self) -> tuple[str, ...]:
        """Where a gateway finds the schedulers of all replicas."""
        if self.scheduler_at:
            return parse_targets(self.scheduler_at)
        replicas = range(self.settings.replicas)
        return tuple(self._socket_target(process_name("scheduler", it)) for it in replicas)

    def for_replica(self, replica: int) -> Self:
        """What the scheduler and the executor of one replica are told, of those that start here.

        Each has ports for metrics and a file of records of its own.
        """
        settings = self.settings
        changed: dict[str, object] = {}
        if settings.metrics_port:
            changed["metrics_port"] = settings.metrics_port + 2 * replica
        if settings.record is not None and replica:
            record = settings.record
            changed["record"] = record.with_name(f"{record.stem}-{replica}{record.suffix}")
        return self.model_copy(
            update={
                "replica": replica,
                "settings": settings.model_copy(update=changed),
            }
        )

    @property
    def of_replicas(self) -> list[Self]:
        """What each of the replicas that start here is told; the first is told this."""
        return [self, *(self.for_replica(it) for it in range(1, self.settings.replicas))]

    def ring_path(self, service: str) -> Path:
        """File of a service's trace ring."""
        name = process_name(service, self.replica)
        return ring_path(self.run_dir, self.supervisor_pid, name)

    def remove_rings(self, services: Iterable[str]) -> None:
        """Remove what is left of the trace rings; for the end of a run, after all processes."""
        for service in services:
            self.ring_path(service).unlink(missing_ok=True)

    def with_addresses(self, *, grpc: str, http: str | None) -> Self:
        """The same with the addresses that the gateway really listens on."""
        chosen = self.settings.model_copy(update={"grpc": grpc, "http": http})
        return self.model_copy(update={"settings": chosen})

    def write(self, path: Path) -> None:
        """Write atomically, readable by the user alone."""
        _write_privately(path, self.model_dump_json(indent=2))

    def publish_address(self) -> None:
        """Say in the state folder where this system is reached."""
        content = {"grpc": self.settings.grpc, "http": self.settings.http}
        _write_privately(self._address_path, json.dumps(content))

    def withdraw_address(self) -> None:
        """Take back what ``publish_address`` said, unless another system says otherwise now."""
        try:
            published = json.loads(self._address_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if published == {"grpc": self.settings.grpc, "http": self.settings.http}:
            self._address_path.unlink(missing_ok=True)

    def _socket_target(self, name: str) -> str:
        return f"unix:{self.run_dir / name}.sock"

    @property
    def _address_path(self) -> Path:
        return self.settings.state_dir / ADDRESS_FILE_NAME

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what ``write`` wrote.

        Raises:
            OSError: if there is no such file.
            pydantic.ValidationError: if it is not ours.
        """
        return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))


def _write_privately(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    partial.replace(path)
