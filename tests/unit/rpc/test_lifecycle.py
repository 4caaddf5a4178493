"""A service says the truth about itself from its start to its end."""

import asyncio
import os
import signal
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pageframe.core.errors import InternalError, PreconditionError
from pageframe.rpc.lifecycle import Service, running, serve

NAME = "pageframe.v1.SchedulerService"


def _service(**changed) -> Service:
    fields = {
        "name": "test",
        "address": "127.0.0.1:0",
        "service_names": (NAME,),
        "register": lambda _server: None,
    }
    return Service(**(fields | changed))


async def _health(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service=NAME), timeout=10)
        return response.status


def test_health_follows_start_and_drain(tmp_path):
    address = f"unix:{tmp_path}/s.sock"
    seen = []

    async def look() -> None:
        seen.append(await _health(address))

    async def main() -> None:
        async with running(_service(address=address, start=look, drain=look)):
            await look()

    asyncio.run(main())
    statuses = health_pb2.HealthCheckResponse
    assert seen == [statuses.NOT_SERVING, statuses.SERVING, statuses.NOT_SERVING]


def test_a_service_tells_the_health_of_what_it_depends_on():
    told = []

    async def main() -> list[int]:
        async with (
            running(_service(begin_health=told.append)) as (address, _),
            grpc.aio.insecure_channel(address) as channel,
        ):
            stub = health_pb2_grpc.HealthStub(channel)
            call = stub.Watch(health_pb2.HealthCheckRequest(service="part"), timeout=10)
            seen = [(await call.read()).status]
            (tell,) = told
            for is_served in (False, True):
                tell("part", is_served)
                seen.append((await call.read()).status)
            return seen

    statuses = health_pb2.HealthCheckResponse
    expected = [statuses.SERVICE_UNKNOWN, statuses.NOT_SERVING, statuses.SERVING]
    assert asyncio.run(main()) == expected


def test_reflection_names_the_services():
    async def main() -> set[str]:
        async with (
            running(_service()) as (address, _),
            grpc.aio.insecure_channel(address) as channel,
        ):
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
            )
            response = await call.read()
            return {entry.name for entry in response.list_services_response.service}

    assert asyncio.run(main()) >= {NAME, "grpc.health.v1.Health"}


def test_a_taken_port_is_named():
    async def main(address: str) -> None:
        async with running(_service(address=address)):
            raise AssertionError("two servers on one port")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PreconditionError, match=address) as caught:
            asyncio.run(main(address))
    assert caught.value.reason == "ADDRESS_IN_USE"


def test_port_zero_becomes_a_real_one():
    async def main() -> str:
        async with running(_service()) as (address, _):
            return address

    host, _, port = asyncio.run(main()).rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0


def test_a_background_failure_ends_the_service_with_its_error():
    async def fail() -> None:
        raise InternalError("BROKEN", "it broke")

    with pytest.raises(InternalError, match="it broke"):
        asyncio.run(serve(_service(background=[fail])))


def test_a_signal_ends_a_service_that_is_up():
    closed = []

    async def close() -> None:
        closed.append(True)

    async def signal_when_up() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    asyncio.run(serve(_service(close=close, background=[signal_when_up])))
    assert closed == [True]


def test_a_signal_ends_a_service_whose_start_waits_for_ever():
    closed = []

    async def start() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    async def close() -> None:
        closed.append(True)

    asyncio.run(serve(_service(start=start, close=close)))
    assert closed == [True]


def test_a_drain_that_never_ends_is_cut_off():
    async def drain() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with running(_service(drain=drain, drain_timeout_s=0.01)):
            pass

    asyncio.run(asyncio.wait_for(main(), 30))
