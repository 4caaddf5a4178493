"""The stack of ``docker-compose.yml`` without a GPU, as Docker Compose runs it; and its phases."""

import json
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compose.docker_host import BASE_IMAGE, eventually, run
from ports import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = "pageframe-test"
SERVICES = ("gateway", "scheduler", "executor")
CPU_FILES = ("docker-compose.yml", "docker-compose.cpu.yml")
TEST_FILE = "tests/compose/docker-compose.test.yml"
BUILD_S = 1800.0
HEALTHY_S = 180.0
COMMAND_S = 120.0
# Docker's own word for a check that has passed.
HEALTHY = "healthy"


@dataclass(slots=True)
class Phases:
    """How long each phase took, in the order in which they ended; a report, judged by nobody."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - start

    def lines(self) -> list[str]:
        width = max(map(len, self.seconds), default=0)
        return [f"{name:{width}}  {took:7.1f} s" for name, took in self.seconds.items()]


class Stack:
    """Services under Docker Compose.

    Args:
        models: Folder on this machine that holds the prepared models.
        torch_index: Where PyTorch's CPU build is; empty where pip's configuration has it.
        kernels: Instruction set to compile CPU kernels for.
    """

    def __init__(self, models: Path, torch_index: str, kernels: str) -> None:
        grpc_port = free_ports(3)
        http_port, traces_port = grpc_port + 1, grpc_port + 2
        self.grpc_address = f"127.0.0.1:{grpc_port}"
        self.http_url = f"http://127.0.0.1:{http_port}"
        self._traces_url = f"http://127.0.0.1:{traces_port}"
        self._environ: Mapping[str, str] = {
            "COMPOSE_DOCKER_CLI_BUILD": "0",
            "DOCKER_BUILDKIT": "0",
            "PAGEFRAME_GRPC_PORT": str(grpc_port),
            "PAGEFRAME_HTTP_PORT": str(http_port),
            "JAEGER_PORT": str(traces_port),
            "PAGEFRAME_MODELS": str(models),
            "PAGEFRAME_TAG": "test",
            "PAGEFRAME_TEST_BASE": BASE_IMAGE,
            "PAGEFRAME_TEST_KERNELS": kernels,
            "PAGEFRAME_TEST_TORCH_INDEX": torch_index,
        }

    def compose(self, *arguments: str, timeout_s: float = COMMAND_S) -> str:
        """Run Docker Compose on the stack; its standard output."""
        files = [word for name in (*CPU_FILES, TEST_FILE) for word in ("-f", name)]
        command = ("docker-compose", "--project-directory", str(REPOSITORY), "-p", PROJECT)
        return run(
            *command, *files, *arguments, timeout_s=timeout_s, environ=self._environ, cwd=REPOSITORY
        )

    def build(self, service: str) -> None:
        self.compose("build", service, timeout_s=BUILD_S)

    def up(self) -> None:
        """Start all; returns before they are healthy."""
        self.compose("up", "-d", "--no-build")

    def down(self) -> None:
        """Stop all and remove containers, networks and volumes."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "60", timeout_s=300)

    def container(self, service: str) -> dict[str, Any]:
        """What Docker says of a service's container."""
        name = self.compose("ps", "--quiet", service).strip()
        assert name, f"{service} has no container"
        (told,) = json.loads(run("docker", "inspect", name, timeout_s=COMMAND_S))
        return dict(told)

    def health(self, service: str) -> str:
        state = self.container(service)["State"]
        return str(state["Health"]["Status"]) if state["Running"] else "stopped"

    def wait_healthy(self, *services: str) -> None:
        """Wait until Docker calls these services healthy."""
        for service in services:
            self._wait_healthy(service)

    def _wait_healthy(self, service: str) -> None:
        eventually(
            lambda: self.health(service) == HEALTHY,
            lambda: f"{service} is healthy\n{self.logs()}",
            HEALTHY_S,
        )

    def logs(self) -> str:
        """The last lines of every service."""
        return self.compose("logs", "--no-color", "--tail", "25")

    def inside(self, service: str, *command: str) -> str:
        """Run a command inside a running container."""
        return self.compose("exec", "-T", service, *command)

    def spans(self, trace_id: str) -> list[dict[str, Any]]:
        """The spans of a trace that have arrived where Jaeger would be."""
        url = f"{self._traces_url}/spans?trace={trace_id}"
        with urllib.request.urlopen(url, timeout=COMMAND_S) as answer:
            return list(json.load(answer))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Call the gateway's HTTP door."""
        request = urllib.request.Request(
            self.http_url + path,
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=COMMAND_S) as answer:
            return dict(json.load(answer))
