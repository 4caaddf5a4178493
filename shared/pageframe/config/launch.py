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
from pageframe.telemetry.ring_path import ring_path

# In the state folder while a system is ready: where client commands find it.
ADDRESS_FILE_NAME = "address.json"


class Launch(BaseModel):
    """Settings after every "choose for me" that the supervisor can answer.

    Attributes:
        settings: As a person chose them; ``grpc`` has its real port once it is known.
        model_path: Hugging Face folder of the model.
        run_dir: Folder of this run, private to the user: Unix sockets, and trace rings where there
            is no shared memory.
        num_threads: CPU threads for computing, at least 1, within the cgroup's quota.
        supervisor_pid: Process that started the services.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    settings: Settings
    model_path: Path
    run_dir: Path
    num_threads: int
    supervisor_pid: int

    @property
    def executor_address(self) -> str:
        """Target of the executor's gRPC channel, a Unix socket in the run folder."""
        return f"unix:{self.run_dir / 'executor.sock'}"

    @property
    def scheduler_address(self) -> str:
        """Target of the scheduler's gRPC channel, a Unix socket in the run folder."""
        return f"unix:{self.run_dir / 'scheduler.sock'}"

    def ring_path(self, service: str) -> Path:
        """File of a service's trace ring."""
        return ring_path(self.run_dir, self.supervisor_pid, service)

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
