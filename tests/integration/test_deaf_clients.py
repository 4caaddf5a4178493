"""Clients that open streams and never read: they cost a bounded amount, and hold nobody up."""

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from integration.system import PATIENCE_S, System
from pageframe.client import GenerationRequest
from pageframe.v1.gateway_service_pb2 import GenerateRequest, TokenIds
from pageframe.v1.gateway_service_pb2_grpc import GatewayServiceStub
from pageframe.v1.sequence_pb2 import DELIVERY_EVERY_TOKEN, SamplingParameters

NUM_DEAF = 32
NUM_TOKENS = 1000
MAX_NUM_SEQUENCES = 16
# At most all tokens that were asked for are kept, each with five log-probabilities as objects.
GATEWAY_GROWTH_BYTES_MAX = NUM_DEAF * NUM_TOKENS * 1024


@pytest.fixture(scope="module")
def system(start: Callable[..., System], sim_model: Path) -> Iterator[System]:
    system = start(
        sim_model,
        *("--sim-step", "1ms", "--max-num-sequences", str(MAX_NUM_SEQUENCES)),
        *("--block-size", "16", "--num-blocks", "2000", "--max-model-len", "4096"),
        *("--trace", "off"),
    )
    yield system
    system.settle()
    system.stop()


def open_deaf_streams(system: System) -> Iterator[grpc.Call]:
    """Streams with a window of 64 KiB that nobody reads from."""
    channel = grpc.insecure_channel(
        system.address,
        options=[("grpc.enable_http_proxy", 0), ("grpc.http2.bdp_probe", 0)],
    )
    stub = GatewayServiceStub(channel)
    for number in range(NUM_DEAF):
        yield stub.Generate(
            GenerateRequest(
                token_ids=TokenIds(ids=[3 + number, 4, 5]),
                sampling=SamplingParameters(
                    max_tokens=NUM_TOKENS, seed=number, ignore_eos=True, num_logprobs=5
                ),
                delivery=DELIVERY_EVERY_TOKEN,
            ),
            timeout=PATIENCE_S,
        )


def test_deaf_clients_hold_nobody_up_and_cost_a_bounded_amount(system: System) -> None:
    heard = GenerationRequest(token_ids=[9, 9, 9], max_tokens=40, seed=5, ignore_eos=True)
    alone = system.complete(heard).samples[0].token_ids
    gateway = system.service("gateway")
    before_bytes = gateway.memory_info().rss
    deaf = list(open_deaf_streams(system))
    try:
        # Others come and go while the deaf ones are generated for.
        for _ in range(8):
            assert system.complete(heard).samples[0].token_ids == alone
        # The deaf ones run to their end at the scheduler although nobody listens.
        system.settle()
        grown_bytes = gateway.memory_info().rss - before_bytes
        assert grown_bytes < GATEWAY_GROWTH_BYTES_MAX
        assert system.complete(heard).samples[0].token_ids == alone
    finally:
        for call in deaf:
            call.cancel()
    system.settle()
    # Who begins to read late, hears all of it in the end: nothing was dropped.
    late = next(open_deaf_streams(system))
    system.settle()
    assert sum(len(message.delta.token_ids) for message in late) == NUM_TOKENS
