"""Many generations on one stream, through three processes: each is what it would be alone."""

import asyncio
import contextlib
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from integration.system import PATIENCE_S, System, error_info, eventually
from pageframe.client import AsyncPageframeClient, Delta, GenerationRequest
from pageframe.core.errors import PageframeError
from pageframe.v1 import gateway_service_pb2 as pb
from pageframe.v1.gateway_service_pb2_grpc import GatewayServiceStub
from pageframe.v1.sequence_pb2 import SamplingParameters

NUM_REQUESTS = 48
SEED = 20261122

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def system(start: Callable[..., System], sim_model: Path) -> Iterator[System]:
    system = start(
        sim_model,
        *("--sim-step", "4ms", "--max-num-sequences", "64", "--block-size", "16"),
        *("--num-blocks", "1500"),
    )
    yield system
    system.settle()
    system.stop()


@pytest.fixture(scope="module")
def requests() -> list[GenerationRequest]:
    print("seed", SEED)
    chance = random.Random(SEED)
    return [
        GenerationRequest(
            token_ids=[3 + chance.randrange(90) for _ in range(chance.randrange(1, 40))],
            max_tokens=chance.randrange(1, 120),
            seed=number,
            ignore_eos=True,
            num_samples=chance.choice((1, 1, 1, 3)),
            num_logprobs=chance.choice((None, 2)),
        )
        for number in range(NUM_REQUESTS)
    ]


@pytest.fixture(scope="module")
def due(system: System, requests: list[GenerationRequest]) -> list[list[list[int]]]:
    """What each would be on a stream of its own: token ids by request and sample."""
    with system.client() as client:
        results = [client.complete(request, timeout_s=PATIENCE_S) for request in requests]
    return [[sample.token_ids for sample in result.samples] for result in results]


async def all_at_once(
    client: AsyncPageframeClient, requests: list[GenerationRequest]
) -> list[list[list[int]]]:
    results = await asyncio.gather(
        *(client.complete(request, timeout_s=PATIENCE_S) for request in requests)
    )
    for result in results:
        for sample in result.samples:
            assert len(sample.logprobs) in (0, len(sample.token_ids))
    return [[sample.token_ids for sample in result.samples] for result in results]


def test_each_is_what_it_would_be_alone(
    system: System, requests: list[GenerationRequest], due: list[list[list[int]]]
) -> None:
    async def scenario() -> list[list[list[int]]]:
        async with AsyncPageframeClient(system.address) as client:
            found = await all_at_once(client, requests)
            assert client._many.is_offered, "the stream is offered, and was used"
            return found

    assert asyncio.run(scenario()) == due


def test_those_that_are_closed_in_the_midst_give_back_their_blocks(
    system: System, requests: list[GenerationRequest], due: list[list[list[int]]]
) -> None:
    async def scenario() -> list[list[list[int]]]:
        async def stop_early(client: AsyncPageframeClient, request: GenerationRequest) -> None:
            async with contextlib.aclosing(client.generate(request)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        return

        async with AsyncPageframeClient(system.address) as client:
            closed = [asyncio.create_task(stop_early(client, it)) for it in requests[1::2]]
            found = await all_at_once(client, requests[::2])
            await asyncio.gather(*closed)
            return found

    assert asyncio.run(scenario()) == due[::2]
    system.settle()


def test_a_killed_gateway_costs_none_of_them_a_token(
    system: System, requests: list[GenerationRequest], due: list[list[list[int]]]
) -> None:
    async def scenario() -> list[list[list[int]]]:
        async with AsyncPageframeClient(system.address, retry_for_s=PATIENCE_S) as client:
            asking = asyncio.create_task(all_at_once(client, requests))
            await asyncio.to_thread(
                eventually, lambda: system.snapshot().num_running > 20, "many run"
            )
            await asyncio.to_thread(system.kill_service, "gateway")
            assert not asking.done(), "it was over before the gateway was killed"
            return await asking

    assert asyncio.run(scenario()) == due
    system.wait_restarted("gateway")


def test_deadlines_are_their_own(system: System) -> None:
    async def scenario() -> tuple[str, int]:
        async with AsyncPageframeClient(system.address) as client:
            whole = GenerationRequest(token_ids=[5], max_tokens=300, seed=1, ignore_eos=True)
            goes_on = asyncio.create_task(client.complete(whole, timeout_s=PATIENCE_S))
            late = GenerationRequest(token_ids=[6], max_tokens=3000, seed=1, ignore_eos=True)
            with pytest.raises(PageframeError) as caught:
                await client.complete(late, timeout_s=0.5)
            return caught.value.status, len((await goes_on).samples[0].token_ids)

    assert asyncio.run(scenario()) == ("DEADLINE_EXCEEDED", 300)
    system.settle()


def start_of(handle: int, max_tokens: int, **sampling: int) -> pb.GenerateManyRequest:
    return pb.GenerateManyRequest(
        start=pb.GenerateStart(
            handle=handle,
            request=pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=[3 + handle, 4]),
                sampling=SamplingParameters(
                    max_tokens=max_tokens, seed=1, ignore_eos=True, **sampling
                ),
            ),
        )
    )


def test_a_caller_that_reads_nothing_holds_nobody_up(system: System) -> None:
    heard = GenerationRequest(token_ids=[9, 9], max_tokens=40, seed=5, ignore_eos=True)
    due = system.complete(heard).samples[0].token_ids
    options = [("grpc.enable_http_proxy", 0), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(system.address, options=options) as channel:
        orders = iter([start_of(handle, 1000, num_logprobs=5) for handle in range(1, 17)])
        deaf = GatewayServiceStub(channel).GenerateMany(orders, timeout=PATIENCE_S)
        eventually(lambda: system.snapshot().num_running == 16, "the deaf ones run")
        for _ in range(8):
            assert system.complete(heard).samples[0].token_ids == due
        # They run to their end at the scheduler although nobody listens.
        system.settle()
        # Who begins to read late, hears all of it in the end: nothing was dropped.
        num_tokens = dict.fromkeys(range(1, 17), 0)
        for message in deaf:
            for part in message.parts:
                num_tokens[part.handle] += len(part.delta.token_ids)
    assert num_tokens == dict.fromkeys(range(1, 17), 1000)


def test_a_drain_lets_run_what_runs_and_waits_for_no_stream_without_work(
    start: Callable[..., System], sim_model: Path
) -> None:
    system = start(sim_model, "--sim-step", "10ms")
    never, later = asyncio.Event(), asyncio.Event()

    async def orders(*starts: pb.GenerateManyRequest):
        for order in starts:
            yield order
        await later.wait()
        yield start_of(2, 5)
        await never.wait()

    async def idle_orders():
        await never.wait()
        yield start_of(1, 5)

    async def scenario() -> tuple[list[pb.GeneratePart], list[grpc.aio.AioRpcError]]:
        async with grpc.aio.insecure_channel(system.address) as channel:
            stub = GatewayServiceStub(channel)
            idle, busy = (
                stub.GenerateMany(idle_orders()),
                stub.GenerateMany(orders(start_of(1, 100))),
            )
            parts: list[pb.GeneratePart] = []
            errors = []
            try:
                async for message in busy:
                    parts += message.parts
                    if message.parts and not later.is_set():
                        system.process.send_signal(signal.SIGTERM)
                        await asyncio.to_thread(
                            eventually, lambda: is_draining(system), "it drains"
                        )
                        later.set()
            except grpc.aio.AioRpcError as error:
                errors.append(error)
            try:
                async for message in idle:
                    assert not message.parts, "nothing was asked"
            except grpc.aio.AioRpcError as error:
                errors.append(error)
            return parts, errors

    parts, errors = asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
    first = [part for part in parts if part.handle == 1]
    assert sum(len(part.delta.token_ids) for part in first) == 100, "what ran was let run"
    assert first[-1].HasField("completion")
    (refused,) = [part.failure for part in parts if part.handle == 2]
    assert (refused.status, refused.reason) == ("UNAVAILABLE", "DRAINING")
    told = [error_info(error)[:2] for error in errors]
    assert told == [(grpc.StatusCode.UNAVAILABLE, "DRAINING")] * 2
    system.wait_ended()


def is_draining(system: System) -> bool:
    stub = health_pb2_grpc.HealthStub(system.gateway_channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    return answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
