"""`pageframe health` says what a service says of itself."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from pageframe.cli.health import main
from pageframe.rpc.health import ask_health

STATUS = health_pb2.HealthCheckResponse


@pytest.fixture
def served() -> Iterator[tuple[str, health.HealthServicer]]:
    servicer = health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("status", "exit_code"), [(STATUS.SERVING, 0), (STATUS.NOT_SERVING, 1)], ids=["up", "drains"]
)
def test_the_exit_code_is_the_health(served, capsys, status, exit_code):
    address, servicer = served
    servicer.set("", status)
    assert main([address]) == exit_code
    assert capsys.readouterr().out == STATUS.ServingStatus.Name(status) + "\n"


def test_nobody_there_is_no_health(served):
    address, _ = served
    port = int(address.rpartition(":")[2])
    assert ask_health(f"127.0.0.1:{port}", timeout_s=30) == "SERVING"
    # Port 1 belongs to the system, and nobody listens on it.
    assert ask_health("127.0.0.1:1", timeout_s=30) == "UNAVAILABLE"


@pytest.mark.parametrize("arguments", [[], ["a:1", "b:2"]])
def test_it_takes_one_address(arguments, capsys):
    assert main(arguments) == 2
    assert "HOST:PORT" in capsys.readouterr().err
