"""Two replicas behind one gateway: prefixes find their blocks, and a lost replica is a stall."""

import json
import re
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from integration.system import PAGEFRAME, PATIENCE_S, System, environment, eventually
from pageframe.client import Delta, Finished, GenerationRequest, PageframeClient, Started
from pageframe.core.request import StallCause
from pageframe.telemetry import spans

NAMES = ("scheduler", "scheduler-1")
PREFIX_TOKENS = 256
LONG = [
    GenerationRequest(token_ids=[number] * 20, max_tokens=150, seed=number, ignore_eos=True)
    for number in range(2, 10)
]
_METRIC = re.compile(r'^(pageframe_gateway_replica_\w+)\{replica="([^"]+)"\} (\S+)$', re.M)


@dataclass(frozen=True, slots=True)
class Output:
    """What a request gave; its trace; and how long it waited for a replica that was lost."""

    token_ids: list[int]
    trace_id: str
    num_cached_tokens: int
    lost_ns: int


@pytest.fixture(scope="module")
def system(start: Callable[..., System], sim_model: Path) -> Iterator[System]:
    system = start(
        sim_model,
        *("--replicas", "2", "--sim-step", "4ms", "--max-num-sequences", "16"),
        *("--block-size", "16", "--num-blocks", "512", "--max-model-len", "1024"),
    )
    yield system
    for name in (*NAMES, "executor", "executor-1", "gateway"):
        eventually(lambda name=name: find(system, name) is not None, f"{name} runs")
    eventually(lambda: healthy(system) == set(NAMES), "all replicas are healthy")
    system.process.send_signal(signal.SIGINT)
    assert system.process.wait(PATIENCE_S) == 0
    assert system.errors() == []


def find(system: System, name: str) -> psutil.Process | None:
    """The process of a service of a replica that runs now, such as ``executor-1``."""
    service, _, replica = name.partition("-")
    # The first executor may have been started before it could be told its launch file.
    launch = (f"/launch-{replica}.json",) if replica else ("/launch.json", "-")
    for child in psutil.Process(system.process.pid).children():
        try:
            words = child.cmdline()
        except psutil.NoSuchProcess:
            continue
        if f"pageframe.{service}" in words and words[-1].endswith(launch):
            return child
    return None


def kill(system: System, *names: str) -> None:
    """SIGKILL services; the supervisor starts others."""
    for name in names:
        victim = find(system, name)
        assert victim is not None, f"no {name} runs"
        victim.kill()


def figures(address: str) -> dict[tuple[str, str], float]:
    """What a gateway tells of its replicas, by metric and replica."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    return {(name, replica): float(value) for name, replica, value in _METRIC.findall(text)}


def healthy(system: System) -> set[str]:
    found = figures(system.http_address)
    return {name for name in NAMES if found["pageframe_gateway_replica_healthy", name]}


def is_up(system: System) -> bool:
    """Whether a gateway answers there that sees both replicas."""
    try:
        return healthy(system) == set(NAMES)
    except OSError:
        return False


def health(system: System) -> dict[str, int]:
    """What load balancers are told of the replicas."""
    with urllib.request.urlopen(f"http://{system.http_address}/health", timeout=PATIENCE_S) as it:
        return json.load(it)["replicas"]


def num_requests(address: str) -> list[float]:
    found = figures(address)
    return [found["pageframe_gateway_replica_requests_total", name] for name in NAMES]


def run(
    address: str, request: GenerationRequest, when_under_way: Callable[[], object] | None = None
) -> Output:
    """Run a request of one sample to its end; have something done once it has ten tokens."""
    token_ids: list[int] = []
    trace_id = ""
    output: Output | None = None
    with PageframeClient(address) as client:
        for part in client.generate(request, timeout_s=PATIENCE_S):
            if isinstance(part, Started):
                trace_id = part.trace_id
            elif isinstance(part, Finished):
                account = part.account
                lost_ns = account.stall_ns.get(StallCause.EXECUTOR_LOST, 0)
                output = Output(token_ids, trace_id, account.num_cached_tokens, lost_ns)
            elif isinstance(part, Delta):
                token_ids += part.token_ids
                if len(token_ids) >= 10 and when_under_way is not None:
                    when_under_way()
                    when_under_way = None
    assert output is not None, "the stream ended without a completion"
    return output


def run_all(
    address: str, requests: Sequence[GenerationRequest], when_under_way: Callable[[], None]
) -> list[Output]:
    """Run requests side by side; have something done when all of them have a few tokens."""
    under_way = threading.Barrier(len(requests) + 1, timeout=PATIENCE_S)
    with ThreadPoolExecutor(len(requests)) as pool:
        futures = [pool.submit(run, address, request, under_way.wait) for request in requests]
        under_way.wait()
        when_under_way()
        return [future.result() for future in futures]


def traced_replicas(system: System, outputs: Sequence[Output]) -> set[object]:
    """Where the traces of outputs say that they ended; None for a trace that is not there yet."""
    found = {
        span.trace_id: span.attributes.get(spans.REPLICA)
        for span in system.spans()
        if span.name == spans.GENERATE
    }
    return {found.get(bytes.fromhex(output.trace_id)) for output in outputs}


def prompts(first: int, count: int) -> list[GenerationRequest]:
    """Requests whose prompts begin differently, and not like those of other tests."""
    return [
        GenerationRequest(token_ids=[number % 250 + 3, number] * (PREFIX_TOKENS // 2), max_tokens=2)
        for number in range(first, first + count)
    ]


def test_prefixes_find_their_blocks_again_and_spread_over_replicas(system: System) -> None:
    before = num_requests(system.http_address)
    requests = prompts(0, 32)
    assert [run(system.address, request).num_cached_tokens for request in requests] == [0] * 32
    placed = [
        num_after - num_before
        for num_after, num_before in zip(num_requests(system.http_address), before, strict=True)
    ]
    assert sum(placed) == 32
    # Of 32 fair coins, fewer than 6 heads or tails come up once in 10,000 times.
    assert min(placed) >= 6
    for request in requests:
        longer = GenerationRequest(token_ids=[*request.token_ids, 5, 6, 7], max_tokens=2)
        assert run(system.address, longer).num_cached_tokens == PREFIX_TOKENS


def test_a_gateway_that_starts_again_and_another_one_route_alike(
    system: System, tmp_path: Path
) -> None:
    requests = prompts(100, 12)
    for request in requests:
        assert run(system.address, request).num_cached_tokens == 0
    kill(system, "gateway")
    eventually(lambda: is_up(system), "the gateway serves again")
    for request in requests:
        assert run(system.address, request).num_cached_tokens >= PREFIX_TOKENS - 16
    with other_gateway(system, tmp_path) as address:
        for request in requests:
            assert run(address, request).num_cached_tokens >= PREFIX_TOKENS - 16


class other_gateway:  # noqa: N801 - used as a function
    """A second gateway over the same replicas, given in the other order; its address."""

    def __init__(self, system: System, folder: Path) -> None:
        command = [str(PAGEFRAME), "serve", "gateway", "--grpc", "127.0.0.1:0", "--http", "off"]
        command += ["--metrics-port", "0", "--trace", "off", "--state-dir", str(folder / "state")]
        for name in reversed(NAMES):
            command += ["--scheduler", f"unix:{system.run_dir / name}.sock"]
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        (address,) = re.findall(r" grpc=(\S+)", line)
        return address

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            assert self._process.wait(PATIENCE_S) == 0
        finally:
            self._process.kill()
            assert self._process.stdout is not None
            self._process.stdout.close()


@pytest.mark.parametrize(
    "victims",
    [("scheduler-1", "executor-1"), ("scheduler",), ("executor-1",)],
    ids=["replica", "scheduler", "executor"],
)
def test_the_streams_of_a_lost_replica_go_on_elsewhere(
    system: System, victims: tuple[str, ...]
) -> None:
    eventually(lambda: healthy(system) == set(NAMES), "all replicas are healthy")
    undisturbed = run_all(system.address, LONG, lambda: None)
    lost = victims[0].replace("executor", "scheduler")
    metric = ("pageframe_gateway_replica_moved_total", lost)
    num_moved = figures(system.http_address)[metric]
    outputs = run_all(system.address, LONG, lambda: kill(system, *victims))
    assert [output.token_ids for output in outputs] == [item.token_ids for item in undisturbed]
    assert all(len(output.token_ids) == 150 for output in outputs)
    num_moved = figures(system.http_address)[metric] - num_moved
    assert 0 < num_moved < len(LONG), "some were there and some were not"
    assert sum(output.lost_ns > 0 for output in outputs) == num_moved
    eventually(
        lambda: traced_replicas(system, undisturbed) == set(NAMES),
        "before, requests were traced at both replicas",
    )
    elsewhere = set(NAMES) - {lost}
    eventually(
        lambda: traced_replicas(system, [it for it in outputs if it.lost_ns]) == elsewhere,
        "those that moved were traced where they ended",
    )


def test_a_replica_without_an_executor_is_told_apart(system: System) -> None:
    eventually(lambda: healthy(system) == set(NAMES), "all replicas are healthy")
    kill(system, "executor-1")
    eventually(
        lambda: healthy(system) == {"scheduler"} and health(system) == {"healthy": 1, "known": 2},
        "the gateway knows of it",
    )
    for request in prompts(200, 4):
        assert len(run(system.address, request).token_ids) == 2
    eventually(lambda: healthy(system) == set(NAMES), "it is back")
