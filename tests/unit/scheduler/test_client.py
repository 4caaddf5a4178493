"""What a scheduler says when it connects to an executor, over real gRPC."""

import asyncio
import contextlib

import grpc
import pytest

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.rpc.handlers import aborting
from pageframe.scheduler.client import GrpcExecutorStream
from pageframe.testing.fake_engine import make_facts
from pageframe.v1 import executor_service_pb2 as pb
from pageframe.v1 import executor_service_pb2_grpc
from pageframe.wire.replica import pool_to_proto, quota_from_proto, replica_to_proto
from unit.scheduler.played_executor import PATIENCE_S

POOL = PoolAccount(total=64, free=60, held=4, host_total=8, host_used=3)


class PlayedExecutorServicer(executor_service_pb2_grpc.ExecutorServiceServicer):
    """Greets, or refuses with ``error``."""

    def __init__(self, error=None):
        self.error = error
        self.hellos = []

    async def Run(self, request_iterator, context):  # noqa: N802 - the name is the contract's
        async with aborting(context):
            first = await anext(aiter(request_iterator))
            self.hellos.append(first.hello)
            if self.error is not None:
                raise self.error
            replica = replica_to_proto(make_facts(num_host_blocks=8))
            hello = pb.ExecutorHello(replica=replica, pool=pool_to_proto(POOL))
            yield pb.RunResponse(hello=hello)


@contextlib.asynccontextmanager
async def playing(folder, servicer):
    server = grpc.aio.server()
    address = f"unix:{folder}/executor.sock"
    executor_service_pb2_grpc.add_ExecutorServiceServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


def test_each_hello_carries_the_quotas(tmp_path):
    quotas = (
        TenantQuota(tenant="a", floor_blocks=3, ceiling_blocks=9),
        TenantQuota(tenant="b", ceiling_blocks=None),
    )

    async def scenario():
        servicer = PlayedExecutorServicer()
        async with playing(tmp_path, servicer) as address:
            for epoch in (1, 2):
                stream = await GrpcExecutorStream.open(address, "s", epoch, quotas=quotas)
                assert (stream.facts, stream.pool) == (make_facts(num_host_blocks=8), POOL)
                await stream.close()
        return servicer.hellos

    hellos = asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
    assert [(hello.scheduler_id, hello.epoch) for hello in hellos] == [("s", 1), ("s", 2)]
    for hello in hellos:
        assert tuple(map(quota_from_proto, hello.quotas)) == quotas


def test_a_refusal_of_the_quotas_is_a_typed_error(tmp_path):
    error = InvalidRequestError("QUOTA_NEGATIVE", "below 0", floor_blocks=-1)

    async def scenario():
        async with playing(tmp_path, PlayedExecutorServicer(error)) as address:
            await GrpcExecutorStream.open(address, "s", 1)

    with pytest.raises(InvalidRequestError) as caught:
        asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
    assert caught.value.reason == "QUOTA_NEGATIVE"
    assert caught.value.limits["floor_blocks"] == "-1"


def test_an_executor_that_begins_with_something_else_is_not_waited_for(tmp_path):
    class Chatterer(executor_service_pb2_grpc.ExecutorServiceServicer):
        async def Run(self, request_iterator, context):  # noqa: N802 - the name is the contract's
            yield pb.RunResponse(result=pb.StepResult())
            async for _ in request_iterator:
                pass

    async def scenario():
        async with playing(tmp_path, Chatterer()) as address:
            with pytest.raises(PreconditionError) as caught:
                await GrpcExecutorStream.open(address, "s", 1)
        assert caught.value.reason == "HELLO_EXPECTED"

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
