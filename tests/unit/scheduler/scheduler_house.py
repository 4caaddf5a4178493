"""A scheduler's server over real gRPC on a Unix socket, and the gateways that talk to it."""

import asyncio
import contextlib

import grpc

from pageframe.core.clock import ManualClock
from pageframe.core.trace import NullTraceSink
from pageframe.rpc.status import from_rpc_error
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.loop import SchedulerLoop
from pageframe.scheduler.options import SchedulerOptions
from pageframe.scheduler.servicer import SchedulerServicer
from pageframe.v1 import scheduler_service_pb2 as pb
from pageframe.v1 import scheduler_service_pb2_grpc
from pageframe.wire.request import events_from_proto, submission_to_proto
from unit.scheduler.driver import make_submission
from unit.scheduler.played_executor import PATIENCE_S, PlayedExecutor


class Peer:
    """One stream as its gateway sees it."""

    def __init__(self, call):
        self.call = call
        self.tokens = []
        self.completions = []

    async def say(self, **message):
        await self.call.write(pb.ConnectRequest(**message))

    async def submit(self, handle, *arguments, **fields):
        request = make_submission(handle, *arguments, **fields)
        await self.say(submit=submission_to_proto(request))
        return request

    async def hear(self):
        """The next message; an end is an error."""
        message = await asyncio.wait_for(self.call.read(), PATIENCE_S)
        assert isinstance(message, pb.ConnectResponse), "the stream has ended"
        return message

    async def hear_completions(self, number):
        """Listen until as many samples have ended."""
        while len(self.completions) < number:
            events = events_from_proto((await self.hear()).events)
            self.tokens += events.token_ids
            self.completions += events.completions
        assert len(self.completions) == number
        return self.completions

    async def end(self):
        """How the stream ends, whatever comes before that; None is well."""
        try:
            while await asyncio.wait_for(self.call.read(), PATIENCE_S) is not grpc.aio.EOF:
                pass
        except grpc.RpcError as error:
            return from_rpc_error(error)
        return None


class House:
    """A scheduler's server between a played executor and gateways."""

    def __init__(self, channel):
        self.clock = ManualClock(1_000_000)
        self.executor = PlayedExecutor()
        self.loop = SchedulerLoop(
            self.executor.open, make_scheduler=self._make_scheduler, clock=self.clock
        )
        self.servicer = SchedulerServicer(self.loop, self.clock)
        self.stub = scheduler_service_pb2_grpc.SchedulerServiceStub(channel)

    def _make_scheduler(self, facts):
        return Scheduler(
            facts,
            SchedulerOptions(token_budget=16, max_num_running=8, lookahead=False),
            trace=NullTraceSink(),
            clock=self.clock,
        )

    def call(self):
        return Peer(self.stub.Connect(timeout=2 * PATIENCE_S))

    async def greet(self, gateway_id="g"):
        """A stream that said hello and has heard no answer yet."""
        peer = self.call()
        await peer.say(hello=pb.GatewayHello(gateway_id=gateway_id))
        return peer

    async def connect(self, gateway_id="g"):
        """A stream that was let in."""
        peer = await self.greet(gateway_id)
        assert (await peer.hear()).HasField("hello")
        return peer

    def snapshot(self):
        return self.stub.Snapshot(pb.SnapshotRequest(), timeout=PATIENCE_S)

    async def start(self):
        await self.loop.start()
        return await self.executor.opened()


@contextlib.asynccontextmanager
async def scheduler_house(folder):
    """Serve on a socket in ``folder`` while the block runs; nobody has started the loop yet."""
    address = f"unix:{folder}/scheduler.sock"
    server = grpc.aio.server()
    async with grpc.aio.insecure_channel(address) as channel:
        house = House(channel)
        scheduler_service_pb2_grpc.add_SchedulerServiceServicer_to_server(house.servicer, server)
        server.add_insecure_port(address)
        await server.start()
        try:
            yield house
        finally:
            await server.stop(None)
            await house.loop.stop()


@contextlib.asynccontextmanager
async def serving(stream):
    """The executor answers by itself."""
    task = asyncio.create_task(stream.serve())
    try:
        yield
    finally:
        task.cancel()
