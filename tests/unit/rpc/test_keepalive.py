"""Peers that vanish without a word are noticed, and those that are only busy are left alone."""

import asyncio
import contextlib
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from certificates import Authority
from pageframe.client.channel import channel_options
from pageframe.rpc.channel import INNER_OPTIONS, InnerChannels, open_aio_channel
from pageframe.rpc.keepalive import NOTICE_MS_MIN, Keepalive
from pageframe.rpc.lifecycle import Service, running
from pageframe.rpc.tls import ClientTls, ServerTls
from relay import Relay

NAME = "pageframe.v1.SchedulerService"
PATIENCE_S = 60.0
QUICK = Keepalive(notice_ms=NOTICE_MS_MIN)
NEVER = Keepalive(notice_ms=3_600_000)
STATUS = health_pb2.HealthCheckResponse


class Waiting:
    """A method whose calls last until they are lost."""

    def __init__(self):
        self.begun = asyncio.Event()
        self.lost = asyncio.Event()

    async def wait(self, _request, _context):
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.lost.set()

    def register(self, server):
        handler = grpc.unary_unary_rpc_method_handler(self.wait)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("test.Waiting", {"Wait": handler}),)
        )


@contextlib.asynccontextmanager
async def _served(keepalive, register=lambda _server: None, tls=None):
    """Yields the port."""
    service = Service(
        name="test",
        address="127.0.0.1:0",
        service_names=(NAME,),
        register=register,
        keepalive=keepalive,
        tls=tls,
    )
    async with running(service) as (address, _):
        yield int(address.rpartition(":")[2])


def _watch(channel):
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())


def _check(channel):
    request = health_pb2.HealthCheckRequest()
    return health_pb2_grpc.HealthStub(channel).Check(
        request, timeout=PATIENCE_S, wait_for_ready=True
    )


def _run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))


def test_a_caller_notices_a_server_that_vanished_and_gets_through_when_it_is_back():
    async def scenario():
        async with _served(NEVER) as port:
            with Relay(port) as relay:
                async with InnerChannels(keepalive=QUICK)(relay.address) as channel:
                    call = _watch(channel)
                    await call.read()
                    relay.vanish()
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call.read()
                relay.come_back()
                async with InnerChannels(keepalive=QUICK)(relay.address) as channel:
                    return caught.value.code(), (await _check(channel)).status

    assert _run(scenario) == (grpc.StatusCode.UNAVAILABLE, STATUS.SERVING)


def test_a_server_notices_a_caller_that_vanished():
    async def scenario():
        waiting = Waiting()
        async with _served(QUICK, waiting.register) as port:
            with Relay(port) as relay:
                async with InnerChannels(keepalive=NEVER)(relay.address) as channel:
                    call = channel.unary_unary("/test.Waiting/Wait")(b"")
                    await waiting.begun.wait()
                    relay.vanish()
                    await waiting.lost.wait()
                    is_caller_waiting = not call.done()
                    call.cancel()
        return is_caller_waiting

    assert _run(scenario)


def test_nobody_is_told_that_it_pings_too_often():
    async def scenario():
        async with _served(QUICK) as port:
            with Relay(port) as relay:
                async with InnerChannels(keepalive=QUICK)(relay.address) as channel:
                    call = _watch(channel)
                    await call.read()
                    enough = relay.num_forwarded + 40
                    await asyncio.to_thread(relay.wait_forwarded, enough, PATIENCE_S)
                    is_open = not call.done()
                    # A server that is annoyed lets streams go on, and takes no new ones.
                    await _check(channel)
                    call.cancel()
                    return is_open, relay.num_connections

    assert _run(scenario) == (True, 1)


HOLDER = """
import asyncio, ctypes, sys
from pageframe.rpc.lifecycle import Service, running

async def main():
    service = Service(
        name="x", address="127.0.0.1:0", service_names=("x",), register=lambda server: None
    )
    async with running(service) as (address, _):
        print(address, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        # Unlike CDLL this keeps the interpreter lock: nothing of Python runs meanwhile.
        ctypes.PyDLL(None).sleep(3)
        print("awake", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


def test_a_process_that_holds_its_interpreter_is_not_lost():
    async def scenario(holder):
        # The line before it is the log's.
        address = next(line for line in holder.stdout if line.startswith("127.")).strip()
        async with InnerChannels(keepalive=QUICK)(address) as channel:
            call = _watch(channel)
            await call.read()
            holder.stdin.write("\n")
            holder.stdin.flush()
            assert await asyncio.to_thread(holder.stdout.readline) == "awake\n"
            is_open = not call.done()
            call.cancel()
            return is_open

    command = [sys.executable, "-c", HOLDER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as holder:
        try:
            assert _run(lambda: scenario(holder))
        finally:
            holder.kill()


def test_callers_from_outside_are_not_pinged():
    names = {name for name, _ in QUICK.options()}
    assert "grpc.http2.ping_timeout_ms" in names
    outside = {name for name, _ in [*channel_options("example.com:1"), *INNER_OPTIONS]}
    assert not names & outside


@pytest.mark.parametrize("options", [INNER_OPTIONS, channel_options("127.0.0.1:1")])
def test_a_peer_far_away_is_reached(options, tmp_path):
    """Each way takes 150 ms; connecting takes several of them."""
    authority = Authority(tmp_path)
    pair = authority.issue("far")

    async def scenario():
        tls = ServerTls(cert=pair.cert, key=pair.key)
        async with _served(None, tls=tls) as port:
            with Relay(port, delay_s=0.15) as relay:
                far = ClientTls(ca=authority.pem)
                async with open_aio_channel(relay.address, options, far) as channel:
                    return (await _check(channel)).status

    assert _run(scenario) == STATUS.SERVING
