"""Services that are started apart from one another and meet by TCP, as containers do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.apart import Alone, published
from integration.system import PATIENCE_S, log_failures
from pageframe.client import GenerationRequest, PageframeClient
from pageframe.rpc.health import ask_health
from pageframe.telemetry.reader import read_spans
from ports import free_ports

REQUEST = GenerationRequest(token_ids=[7, 8, 9], max_tokens=20, seed=1)


@pytest.fixture
def apart(tmp_path: Path, sim_model: Path) -> Iterator[dict[str, Alone]]:
    """Gateway, scheduler and executor, each with a supervisor, a folder and an exporter."""
    ports = {name: free_ports() for name in ("scheduler", "executor")}
    scheduler, executor = (f"127.0.0.1:{ports[name]}" for name in ("scheduler", "executor"))
    model = ("--model", str(sim_model))
    running: dict[str, Alone] = {}
    try:
        running["executor"] = Alone(
            *(tmp_path, "executor", "--listen", executor, *model),
            *("--runner", "sim", "--sim-step", "2ms"),
        )
        running["scheduler"] = Alone(
            *(tmp_path, "scheduler", "--listen", scheduler, "--executor", executor, *model)
        )
        running["gateway"] = Alone(
            *(tmp_path, "gateway", "--scheduler", scheduler, *model),
            *("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"),
        )
        yield running
    finally:
        for alone in running.values():
            alone.kill()


def test_services_apart_serve_survive_and_end_well(apart: dict[str, Alone]) -> None:
    address = published(apart["gateway"])
    assert ask_health(address) == "SERVING"
    with PageframeClient(address) as client:
        first = client.complete(REQUEST, timeout_s=PATIENCE_S)
        # The executor's supervisor brings it back, and the others find it again.
        victim = apart["executor"].child("pageframe.executor")
        assert victim is not None
        victim.kill()
        again = client.complete(REQUEST, timeout_s=PATIENCE_S)
    assert first.samples[0].token_ids == again.samples[0].token_ids
    assert len(first.samples[0].token_ids) == 20
    exit_codes = [apart[name].stop() for name in ("gateway", "scheduler", "executor")]
    assert exit_codes == [0, 0, 0], [alone.output() for alone in apart.values()]
    assert not (apart["gateway"].state_dir / "address.json").exists()
    trace_id = first.started.trace_id
    # Every service tells its own part, and a line of the supervisor's is all that is not JSON.
    for name, alone in apart.items():
        spans = read_spans(alone.state_dir / "traces")
        assert {s.service for s in spans if s.trace_id.hex() == trace_id} == {f"pageframe-{name}"}
        # It lies elsewhere where this path is too long for a socket.
        assert list((alone.state_dir / "run").glob("*")) == []
        assert f"pageframe ready service={name} " in alone.output()
        assert [log_failures(path) for path in (alone.state_dir / "logs").glob(f"{name}.log")] == [
            []
        ]
