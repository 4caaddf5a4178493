"""An executor's server over real gRPC on a Unix socket, and the schedulers that talk to it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc

from pageframe.core.errors import PageframeError
from pageframe.executor.servicer import ExecutorServicer
from pageframe.executor.step_thread import StepThread
from pageframe.rpc.status import from_rpc_error
from pageframe.testing.fake_engine import make_facts
from pageframe.v1 import executor_service_pb2 as pb
from pageframe.v1 import executor_service_pb2_grpc
from unit.executor.played_engine import PATIENCE_S, PlayedEngine

INCARNATION = 77
FACTS = make_facts()


class Peer:
    """One stream as its scheduler sees it."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self.call = call

    async def say(self, **message: object) -> None:
        await self.call.write(pb.RunRequest(**message))

    async def plan(self, step: int) -> None:
        await self.say(plan=pb.StepPlan(step=step, builds_on=step - 1))

    async def hear(self) -> pb.RunResponse:
        """The next message; an end is an error."""
        message = await asyncio.wait_for(self.call.read(), PATIENCE_S)
        assert isinstance(message, pb.RunResponse), "the stream has ended"
        return message

    async def end(self) -> PageframeError | None:
        """How the stream ends; None is well. Nothing may come before that."""
        try:
            message = await asyncio.wait_for(self.call.read(), PATIENCE_S)
        except grpc.RpcError as error:
            return from_rpc_error(error)
        assert message is grpc.aio.EOF, f"not an end: {message}"
        return None

    async def part(self) -> None:
        """Say that nothing more comes, and wait for the executor to do the same."""
        await self.call.done_writing()
        assert await self.end() is None


class ExecutorHouse:
    """The server and what stands behind it."""

    def __init__(self, channel: grpc.aio.Channel, engine: PlayedEngine) -> None:
        self.engine = engine
        self.steps = StepThread(asyncio.get_running_loop())
        self.servicer = ExecutorServicer(self.steps, pool_incarnation=INCARNATION)
        self.stub = executor_service_pb2_grpc.ExecutorServiceStub(channel)

    def call(self) -> Peer:
        """A stream on which nothing was said yet."""
        return Peer(self.stub.Run(timeout=2 * PATIENCE_S))

    async def greet(self, scheduler_id: str = "a", epoch: int = 1) -> Peer:
        """A stream that said hello and has heard no answer yet."""
        peer = self.call()
        await peer.say(hello=pb.SchedulerHello(scheduler_id=scheduler_id, epoch=epoch))
        return peer

    async def connect(self, scheduler_id: str = "a", epoch: int = 1) -> Peer:
        """A stream that was let in."""
        peer = await self.greet(scheduler_id, epoch)
        assert (await peer.hear()).HasField("hello")
        return peer

    async def connect_when_free(self, scheduler_id: str) -> Peer:
        """Knock until the scheduler before is gone, which is noticed only after it went."""
        while True:
            peer = await self.greet(scheduler_id)
            try:
                assert (await peer.hear()).HasField("hello")
            except grpc.RpcError as error:
                if from_rpc_error(error).reason != "SCHEDULER_CONNECTED":
                    raise
            else:
                return peer


@contextlib.asynccontextmanager
async def executor_house(
    folder: object, engine: object = None, *, is_open: bool = True
) -> AsyncIterator[ExecutorHouse]:
    """Serve on a socket in ``folder`` while the block runs."""
    address = f"unix:{folder}/executor.sock"
    server = grpc.aio.server()
    async with grpc.aio.insecure_channel(address) as channel:
        house = ExecutorHouse(channel, engine or PlayedEngine())
        executor_service_pb2_grpc.add_ExecutorServiceServicer_to_server(house.servicer, server)
        server.add_insecure_port(address)
        await server.start()
        await house.steps.start(lambda: house.engine)
        if is_open:
            house.servicer.open(FACTS)
        try:
            yield house
        finally:
            await server.stop(None)
            await house.steps.stop()
