"""The gateway process: connect to the scheduler, serve callers."""

import asyncio
import functools
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from pageframe.client.kv_memory_aio import KvMemoryClients
from pageframe.config.launch import Launch
from pageframe.config.settings import Settings
from pageframe.core.clock import Clock, SystemClock
from pageframe.gateway.client import SchedulerLink
from pageframe.gateway.codec_store import CodecStore
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.http.app import Door
from pageframe.gateway.http.pool_page import PoolPage
from pageframe.gateway.http.server import HttpServer
from pageframe.gateway.replicas import ReplicaSet
from pageframe.gateway.routing import RoutingOptions
from pageframe.gateway.servicer import GatewayServicer, Malformed
from pageframe.rpc.access_file import AccessFile
from pageframe.rpc.addresses import ReplicaAddresses
from pageframe.rpc.auth import Authenticator
from pageframe.rpc.lifecycle import Service, serve
from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import Reading
from pageframe.telemetry.metrics_door import MetricsDoor
from pageframe.telemetry.metrics_text import MetricsText
from pageframe.telemetry.sink import RingTraceSink, SilentTraceSink
from pageframe.telemetry.spans import SERVICE_GATEWAY
from pageframe.v1 import gateway_service_pb2

SERVICE_NAMES = ("pageframe.v1.GatewayService",)

# By whether the caller streams, and whether the gateway does.
_HANDLER_MAKERS: dict[tuple[bool, bool], Callable[..., "grpc.RpcMethodHandler[Any, Any]"]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


async def serve_gateway(launch: Launch) -> None:
    """Serve until told to stop.

    Raises:
        PageframeError: whatever stands in the way of serving.
    """
    settings, clock = launch.settings, SystemClock()
    sink = RingTraceSink.create(launch.ring_path("gateway"), SERVICE_GATEWAY, settings.trace)
    replicas = make_replicas(launch, clock)
    access_file = AccessFile(settings.api_keys)
    authenticator = access_file.authenticator()
    codecs = CodecStore()
    service = GenerationService(replicas, codecs, authenticator, clock, sink)
    servicer = GatewayServicer(service, authenticator, clock)
    pool = make_pool_page(launch, authenticator, clock, service)
    text = make_metrics_text(service, replicas, pool, sink)
    port = settings.metrics_port_of("gateway")
    metrics_door = MetricsDoor(port, text.render, host=settings.metrics_host)
    door = Door(service, authenticator, clock, text.render, pool, replicas.count)
    http = make_http_server(settings, door)
    linked: list[asyncio.Task[None]] = []

    async def start() -> None:
        linked.append(asyncio.create_task(replicas.run()))
        if launch.model_path != Path():
            # While the executor loads the same model, which takes longer; then nobody waits for it.
            await codecs.load_ahead(launch.model_path)
        await replicas.wait_ready()
        await service.load()
        await metrics_door.start()
        if http is not None:
            await http.start()

    async def wait_ended() -> None:
        await asyncio.gather(*linked)

    async def drain() -> None:
        await service.drain()
        servicer.end_streams()
        pool.close()
        if http is not None:
            await http.stop()

    async def close() -> None:
        await metrics_door.stop()
        if http is not None:
            await http.stop()
        await pool.stop()
        for task in linked:
            task.cancel()
        await asyncio.gather(*linked, return_exceptions=True)
        sink.close()

    await serve(
        Service(
            name=SERVICE_GATEWAY,
            address=settings.grpc,
            service_names=SERVICE_NAMES,
            register=lambda server: register(servicer, server),
            start=start,
            drain=drain,
            close=close,
            drain_timeout_s=settings.drain_timeout_seconds,
            background=[wait_ended, access_file.watch],
            details=lambda: {} if http is None else {"http": http.address},
            tls=settings.server_tls(),
        )
    )


def make_metrics_text(
    service: GenerationService,
    replicas: ReplicaSet,
    pool: PoolPage,
    sink: RingTraceSink | SilentTraceSink,
) -> MetricsText:
    """What the gateway tells of itself."""
    return MetricsText(
        lambda: (
            *service.readings(),
            *replicas.readings(),
            *pool.readings(),
            Reading(metrics.DROPPED_RECORDS, sink.num_dropped),
        )
    )


def make_replicas(launch: Launch, clock: Clock) -> ReplicaSet:
    """The links to all schedulers of a launch, none of them connected yet."""
    settings = launch.settings
    return ReplicaSet(
        ReplicaAddresses(launch.scheduler_targets),
        functools.partial(
            SchedulerLink,
            gateway_id=_gateway_id(),
            clock=clock,
            open_channel=settings.inner_channels(),
        ),
        RoutingOptions(
            num_prefix_tokens=settings.route_prefix_tokens, headroom=settings.route_headroom
        ),
        clock,
    )


def make_http_server(settings: Settings, door: Door) -> HttpServer | None:
    """The server of the HTTP door; None where there is to be none."""
    if settings.http is None:
        return None
    return HttpServer(door.app(), settings.http, settings.server_tls())


def make_pool_page(
    launch: Launch, authenticator: Authenticator, clock: Clock, service: GenerationService
) -> PoolPage:
    """The page that shows the pools of all executors of a launch."""
    return PoolPage(
        ReplicaAddresses(launch.executor_targets),
        authenticator,
        clock,
        service.readings,
        open_clients=functools.partial(
            KvMemoryClients, open_channel=launch.settings.inner_channels()
        ),
    )


def register(servicer: GatewayServicer, server: grpc.aio.Server) -> None:
    """Add the servicer's methods to a server.

    Unlike the generated function, bytes that cannot be parsed reach the servicer, as ``Malformed``;
    gRPC would answer them with a status that has neither a reason nor a sensible code.
    """
    service = gateway_service_pb2.DESCRIPTOR.services_by_name["GatewayService"]
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in service.methods:
        make_handler = _HANDLER_MAKERS[method.client_streaming, method.server_streaming]
        handlers[method.name] = make_handler(
            getattr(servicer, method.name),
            request_deserializer=_tolerant(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service.full_name, handlers),)
    )


def _tolerant(message_class: type[Message]) -> Callable[[bytes], Message | Malformed]:
    def parse(data: bytes) -> Message | Malformed:
        try:
            return message_class.FromString(data)
        except DecodeError:
            return Malformed()

    return parse


def _gateway_id() -> str:
    # Gateways are replicas of one another: a name of its own for every process, also after a
    # restart, since what it served before ended with its streams.
    return f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
