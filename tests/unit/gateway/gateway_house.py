"""A gateway over real gRPC, between a client's stub and a scheduler that the test plays."""

import asyncio
import contextlib

import grpc

from pageframe.core.clock import SystemClock
from pageframe.core.trace import NullTraceSink
from pageframe.gateway.client import SchedulerLink
from pageframe.gateway.codec_store import CodecStore
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.server import register
from pageframe.gateway.servicer import GatewayServicer
from pageframe.rpc.auth import Authenticator
from pageframe.v1 import (
    gateway_service_pb2_grpc,
    scheduler_service_pb2,
    scheduler_service_pb2_grpc,
    sequence_pb2,
)
from pageframe.wire.replica import replica_to_proto
from unit.gateway.replicas import make_facts
from unit.orders import each

TIMEOUT_S = 20


class PlayedScheduler(scheduler_service_pb2_grpc.SchedulerServiceServicer):
    """Keeps what gateways send; says what the test says."""

    def __init__(self, facts):
        self.facts = facts
        self.submitted = asyncio.Queue()
        self.cancelled = asyncio.Queue()
        self.streams = []
        self.messages = []

    async def Connect(self, request_iterator, context):  # noqa: N802
        outbox = asyncio.Queue()
        self.streams.append(outbox)
        hello = scheduler_service_pb2.ConnectHello(replica=replica_to_proto(self.facts))
        await context.write(scheduler_service_pb2.ConnectResponse(hello=hello))
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while (message := await outbox.get()) is not None:
                await context.write(message)
        finally:
            reader.cancel()

    async def _read(self, request_iterator):
        async for request in request_iterator:
            self.messages.append(request)
            for order in each([request]):
                kind = order.WhichOneof("message")
                if kind == "submit":
                    self.submitted.put_nowait(order.submit)
                elif kind == "cancel":
                    self.cancelled.put_nowait(order.cancel)

    def tokens(self, submission, token_ids, sample_index=0):
        self._say(
            handles=[submission.handle],
            sample_indices=[sample_index],
            num_tokens=[len(token_ids)],
            token_ids=token_ids,
        )

    def end(self, submission, reason=sequence_pb2.FINISH_REASON_LENGTH, sample_index=0, **fields):
        self._say(
            completions=[
                scheduler_service_pb2.SampleCompletion(
                    handle=submission.handle,
                    sample_index=sample_index,
                    finish_reason=reason,
                    **fields,
                )
            ]
        )

    def lose_stream(self):
        self.streams[-1].put_nowait(None)

    def _say(self, **fields):
        events = scheduler_service_pb2.TokenEvents(step=1, **fields)
        message = scheduler_service_pb2.ConnectResponse(events=events)
        self.streams[-1].put_nowait(message)


class House:
    """A gateway between a played scheduler and a client's stub."""

    def __init__(self, scheduler, link, servicer, stub, channel):
        self.scheduler = scheduler
        self.link = link
        self.servicer = servicer
        self.service = servicer._service
        self.authenticator = servicer._authenticator
        self.stub = stub
        self.channel = channel

    async def submitted(self):
        return await asyncio.wait_for(self.scheduler.submitted.get(), TIMEOUT_S)

    async def cancelled(self):
        return await asyncio.wait_for(self.scheduler.cancelled.get(), TIMEOUT_S)


@contextlib.asynccontextmanager
async def gateway_house(folder, *, keys=None, lost_after_s=30.0, **facts):
    scheduler = PlayedScheduler(make_facts(model_folder=str(folder), **facts))
    inner = grpc.aio.server()
    scheduler_service_pb2_grpc.add_SchedulerServiceServicer_to_server(scheduler, inner)
    inner_port = inner.add_insecure_port("127.0.0.1:0")
    await inner.start()
    link = SchedulerLink(
        f"127.0.0.1:{inner_port}", gateway_id="gateway-0", lost_after_s=lost_after_s
    )
    linked = asyncio.create_task(link.run())
    clock, authenticator = SystemClock(), Authenticator(keys or {})
    service = GenerationService(link, CodecStore(), authenticator, clock, NullTraceSink())
    outer = grpc.aio.server(options=[("grpc.max_receive_message_length", 16 << 20)])
    servicer = GatewayServicer(service, authenticator, clock)
    register(servicer, outer)
    outer_port = outer.add_insecure_port("127.0.0.1:0")
    await outer.start()
    await asyncio.wait_for(link.wait_ready(), TIMEOUT_S)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{outer_port}") as channel:
            stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)
            yield House(scheduler, link, servicer, stub, channel)
    finally:
        linked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await linked
        await outer.stop(None)
        await inner.stop(None)
