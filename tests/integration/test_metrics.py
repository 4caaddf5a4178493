"""Metrics of real processes, as Prometheus would read them."""

import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from integration.system import System
from pageframe.client import GenerationRequest
from pageframe.config.settings import METERED_SERVICES
from pageframe.telemetry.metrics import METRICS
from ports import free_ports


class MeteredSystem:
    """A system and its three pages."""

    def __init__(self, system: System, port: int) -> None:
        self.system = system
        self.port = port

    def values(self) -> dict[tuple[str, ...], float]:
        """All values of all services; service, name, then label values in the order of names."""
        found = {}
        for number, service in enumerate(METERED_SERVICES):
            text = self._read(f"127.0.0.1:{self.port + number}")
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    labels = [sample.labels[name] for name in sorted(sample.labels)]
                    found[service, sample.name, *labels] = sample.value
        return found

    def _read(self, address: str) -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as page:
            return page.read().decode()


@pytest.fixture(scope="module")
def metered(start: Callable[..., System], sim_model: Path) -> Iterator[MeteredSystem]:
    port = free_ports(len(METERED_SERVICES))
    system = start(
        sim_model, "--metrics-port", str(port), "--num-blocks", "64", "--block-size", "16"
    )
    yield MeteredSystem(system, port)
    system.settle()
    system.stop()


def generate(metered: MeteredSystem, **fields) -> None:
    metered.system.complete(GenerationRequest(**fields))


def test_every_metric_is_told_where_the_table_says(metered: MeteredSystem) -> None:
    generate(metered, prompt="the fox", max_tokens=4)
    names = {(key[0], key[1]) for key in metered.values()}
    for metric in METRICS:
        name = metric.name + ("_bucket" if metric.kind == "histogram" else "")
        for service in metric.services:
            assert (service, name) in names


def test_counts_are_those_of_what_was_asked(metered: MeteredSystem) -> None:
    before = metered.values()
    prompt = list(range(2, 50))
    for _ in range(2):
        generate(metered, token_ids=prompt, max_tokens=10, ignore_eos=True)
    metered.system.settle()
    after = metered.values()

    def grown(*key: str) -> float:
        return after[key] - before.get(key, 0.0)

    gateway = "gateway"
    assert grown(gateway, "pageframe_requests_total", "ok", "default") == 2
    assert grown(gateway, "pageframe_prompt_tokens_total", "default") == 96
    assert grown(gateway, "pageframe_cached_prompt_tokens_total", "default") >= 32
    assert grown(gateway, "pageframe_output_tokens_total", "default") == 20
    assert grown(gateway, "pageframe_ttft_seconds_count") == 2
    assert grown(gateway, "pageframe_inter_token_seconds_count") == 18
    assert grown("scheduler", "pageframe_sampled_tokens_total") == 20
    assert grown("scheduler", "pageframe_step_seconds_count") >= 20
    assert grown("executor", "pageframe_kv_operations_total") > 0
    states = {key[2]: value for key, value in after.items() if key[1] == "pageframe_blocks"}
    assert sum(states.values()) == 64
    assert states["cached"] >= 3
    assert after["scheduler", "pageframe_executor_connected"] == 1
    assert after["executor", "process_resident_memory_bytes"] > 2**20


def test_refusals_are_counted_by_their_reason(metered: MeteredSystem) -> None:
    with metered.system.client() as client, pytest.raises(Exception, match="temperature"):
        client.complete(GenerationRequest(prompt="a", temperature=-1.0))
    values = metered.values()
    reason = "sampling_parameter_out_of_range"
    assert values["gateway", "pageframe_requests_total", reason, "default"] == 1


def test_the_http_door_has_the_gateways_page(metered: MeteredSystem) -> None:
    text = metered._read(metered.system.http_address)
    assert "pageframe_ttft_seconds_bucket" in text
