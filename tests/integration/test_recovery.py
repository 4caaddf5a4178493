"""Any process may die at any time: a stall, and then the very tokens that were due anyway."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from integration.system import PATIENCE_S, System, eventually
from pageframe.client import Delta, Finished, GenerationRequest, Started
from pageframe.core.request import StallCause
from pageframe.v1.gateway_service_pb2 import GenerateRequest, TokenIds
from pageframe.v1.sequence_pb2 import SamplingParameters

REQUESTS = [
    GenerationRequest(token_ids=[7, 8, 9], max_tokens=150, seed=1, request_id="first"),
    GenerationRequest(token_ids=[4] * 33, max_tokens=90, temperature=0.0),
    GenerationRequest(token_ids=[5] * 20, max_tokens=60, seed=3, num_samples=3),
    # Still in its prefill when the others decode.
    GenerationRequest(token_ids=[6] * 700, max_tokens=20, seed=4),
]
NUM_TOKENS_BEFORE = 20


@dataclass(frozen=True, slots=True)
class Output:
    """Token ids by sample, and how long the first one waited for an executor that had died."""

    token_ids: list[list[int]]
    executor_lost_ns: int = field(compare=False)


@pytest.fixture(scope="module")
def system(start: Callable[..., System], sim_model: Path) -> Iterator[System]:
    """Six sequences, of which four run at once: some wait when a process dies."""
    system = start(
        sim_model,
        *("--sim-step", "10ms", "--prefill-chunk-tokens", "16", "--max-num-sequences", "4"),
        *("--block-size", "16", "--num-blocks", "64", "--max-model-len", "1024"),
    )
    yield system
    system.settle()
    system.stop()


@pytest.fixture(scope="module")
def undisturbed(system: System) -> list[Output]:
    """What the requests give when nobody dies."""
    outputs = run_all(system, lambda: None)
    lengths = [len(token_ids) for output in outputs for token_ids in output.token_ids]
    assert lengths == [150, 90, 60, 60, 60, 20]
    return outputs


@pytest.fixture(autouse=True)
def _everything_comes_back(system: System) -> Iterator[None]:
    yield
    eventually(lambda: is_connected(system), "all services are connected again")
    system.settle()


def is_connected(system: System) -> bool:
    with contextlib.suppress(grpc.RpcError):
        return system.snapshot().executor_connected
    return False


def run_all(system: System, when_under_way: Callable[[], None]) -> list[Output]:
    """Run all requests, and do something when the first, which began first, is well under way.

    By then the others have begun, too, however busy the machine is: who has not loses nothing.
    """
    has_begun = [threading.Event() for _ in REQUESTS]
    is_under_way = threading.Event()

    def run(request: GenerationRequest) -> Output:
        token_ids: list[list[int]] = [[] for _ in range(request.num_samples)]
        executor_lost_ns = 0
        with system.client(retry_for_s=PATIENCE_S) as client:
            for event in client.generate(request, timeout_s=PATIENCE_S):
                if isinstance(event, Delta):
                    token_ids[event.sample_index] += event.token_ids
                elif isinstance(event, Started):
                    has_begun[REQUESTS.index(request)].set()
                elif isinstance(event, Finished) and event.sample_index == 0:
                    executor_lost_ns = event.account.stall_ns.get(StallCause.EXECUTOR_LOST, 0)
                if len(token_ids[0]) >= NUM_TOKENS_BEFORE and request is REQUESTS[0]:
                    is_under_way.set()
        return Output(token_ids, executor_lost_ns)

    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        running = [threads.submit(run, REQUESTS[0])]
        assert has_begun[0].wait(PATIENCE_S)
        running += [threads.submit(run, request) for request in REQUESTS[1:]]
        assert all(begun.wait(PATIENCE_S) for begun in has_begun)
        assert is_under_way.wait(PATIENCE_S)
        when_under_way()
        return [future.result() for future in running]


@pytest.mark.parametrize(
    "victims", [["executor"], ["scheduler"], ["executor", "scheduler"]], ids="+".join
)
def test_a_death_is_a_stall_and_changes_no_token(
    system: System, undisturbed: list[Output], victims: Sequence[str]
) -> None:
    def kill() -> None:
        assert system.snapshot().sequences, "there is something to lose"
        for name in victims:
            system.kill_service(name)

    outputs = run_all(system, kill)
    assert outputs == undisturbed
    if victims == ["executor"]:
        assert all(output.executor_lost_ns > 0 for output in outputs), "the wait has a cause"
    for name in victims:
        system.wait_restarted(name)


def test_a_gateway_that_dies_ends_its_streams(system: System) -> None:
    request = GenerateRequest(
        token_ids=TokenIds(ids=[3]), sampling=SamplingParameters(max_tokens=500)
    )
    with system.stream(request) as stream:
        next(stream)
        next(stream)
        system.kill_service("gateway")
        with pytest.raises(grpc.RpcError) as ended:
            list(stream)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    system.wait_restarted("gateway")


@pytest.mark.parametrize("number", [0, 2], ids=["one sample", "three samples"])
def test_our_client_goes_on_at_the_gateway_that_comes_next(
    system: System, undisturbed: list[Output], number: int
) -> None:
    request = REQUESTS[number]
    with system.client(retry_for_s=PATIENCE_S) as client:
        events = []
        for event in client.generate(request, timeout_s=PATIENCE_S):
            events.append(event)
            if len(events) == NUM_TOKENS_BEFORE:
                system.kill_service("gateway")
    system.wait_restarted("gateway")
    token_ids: list[list[int]] = [[] for _ in range(request.num_samples)]
    for event in events:
        if isinstance(event, Delta):
            token_ids[event.sample_index] += event.token_ids
    assert token_ids == undisturbed[number].token_ids
    assert sum(isinstance(event, Started) for event in events) == 1, "the caller noticed nothing"
    assert sum(isinstance(event, Finished) for event in events) == request.num_samples
