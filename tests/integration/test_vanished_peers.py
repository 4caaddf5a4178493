"""A service whose machine is gone closes no connection; the one that calls it notices anyway."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.apart import Alone, published
from integration.system import PATIENCE_S, eventually
from pageframe.client import Delta, GenerationRequest, PageframeClient, collect
from ports import free_ports
from relay import Relay

REQUEST = GenerationRequest(token_ids=[7, 8, 9], max_tokens=600, seed=1)
# As short as it can be asked for.
QUICK = {"PAGEFRAME_PEER_TIMEOUT": "1s"}


class Cabled:
    """Three services with a cable in each gap."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.ports = {name: free_ports() for name in ("scheduler", "executor")}
        self.cables = {name: Relay(port) for name, port in self.ports.items()}
        options = ("--model", str(model))
        self.services = {
            "executor": Alone(
                *(folder, "executor", "--listen", f"127.0.0.1:{self.ports['executor']}"),
                *(*options, "--runner", "sim", "--sim-step", "5ms"),
                **QUICK,
            ),
            "scheduler": Alone(
                *(folder, "scheduler", "--listen", f"127.0.0.1:{self.ports['scheduler']}"),
                *(*options, "--executor", self.cables["executor"].address),
                **QUICK,
            ),
            "gateway": Alone(
                *(folder, "gateway", "--scheduler", self.cables["scheduler"].address),
                *(*options, "--grpc", "127.0.0.1:0", "--http", "off"),
                **QUICK,
            ),
        }

    def end(self) -> None:
        for service in self.services.values():
            service.kill()
        for cable in self.cables.values():
            cable.__exit__()


@pytest.fixture(scope="module")
def cabled(tmp_path_factory: pytest.TempPathFactory, sim_model: Path) -> Iterator[Cabled]:
    made = Cabled(tmp_path_factory.mktemp("cabled"), sim_model)
    yield made
    made.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("called", "caller", "loss"),
    [
        ("executor", "scheduler", "executor_lost"),
        ("scheduler", "gateway", "scheduler_lost"),
    ],
)
def test_a_cut_cable_is_noticed_and_nothing_is_lost(
    cabled: Cabled, called: str, caller: str, loss: str
) -> None:
    with PageframeClient(published(cabled.services["gateway"])) as client:
        expected = client.complete(REQUEST, timeout_s=PATIENCE_S).samples[0].token_ids
        events = client.generate(REQUEST, timeout_s=PATIENCE_S)
        seen = []
        for event in events:
            seen.append(event)
            if isinstance(event, Delta):
                break
        cabled.cables[called].vanish()
        watching = cabled.services[caller]
        eventually(lambda: watching.says(loss), f"the {caller} notices: {watching.output()}")
        cabled.cables[called].come_back()
        result = collect([*seen, *events])
    assert result.samples[0].token_ids == expected
    assert len(expected) == REQUEST.max_tokens
    # Nor is a peer that is there ever taken to be lost, or told that it pings too often.
    assert watching.output().count(loss) == 1
    assert not any(service.says("too_many_pings") for service in cabled.services.values())
