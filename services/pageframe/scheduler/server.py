"""The scheduler process: connect to the executor, serve gateways."""

import functools

import grpc

from pageframe.config.launch import Launch
from pageframe.config.settings import Settings
from pageframe.core.clock import Clock, SystemClock
from pageframe.core.plan import Recovery
from pageframe.core.replica import ReplicaFacts
from pageframe.core.trace import TraceSink
from pageframe.rpc.lifecycle import Service, serve
from pageframe.scheduler.client import GrpcExecutorStream
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.loop import SchedulerLoop
from pageframe.scheduler.options import SchedulerOptions
from pageframe.scheduler.servicer import SchedulerServicer
from pageframe.telemetry.sink import RingTraceSink
from pageframe.telemetry.spans import SERVICE_SCHEDULER
from pageframe.v1 import scheduler_service_pb2_grpc

SERVICE_NAMES = ("pageframe.v1.SchedulerService",)

GATEWAY_GRACE_S = 5.0
"""How long requests of a lost gateway stream go on, in case it comes back."""


async def serve_scheduler(launch: Launch) -> None:
    """Serve until told to stop."""
    settings = launch.settings
    clock = SystemClock()
    trace = RingTraceSink.create(launch.ring_path("scheduler"), SERVICE_SCHEDULER, settings.trace)

    def build(facts: ReplicaFacts) -> Scheduler:
        return make_scheduler(facts, settings, trace, clock)

    open_stream = functools.partial(
        GrpcExecutorStream.open,
        launch.executor_address,
        settings.model,
        quotas=settings.tenant_quotas,
    )
    loop = SchedulerLoop(open_stream, make_scheduler=build, clock=clock)
    servicer = SchedulerServicer(loop, clock, grace_s=GATEWAY_GRACE_S)

    def register(server: grpc.aio.Server) -> None:
        scheduler_service_pb2_grpc.add_SchedulerServiceServicer_to_server(servicer, server)

    async def drain() -> None:
        await servicer.drain(settings.drain_timeout_seconds)

    async def close() -> None:
        trace.close()

    await serve(
        Service(
            name=SERVICE_SCHEDULER,
            address=launch.scheduler_address,
            service_names=SERVICE_NAMES,
            register=register,
            start=loop.start,
            drain=drain,
            close=close,
            drain_timeout_s=settings.drain_timeout_seconds,
            background=[loop.wait_ended],
        )
    )


def make_scheduler(
    facts: ReplicaFacts, settings: Settings, trace: TraceSink, clock: Clock
) -> Scheduler:
    """The pure core as the settings want it."""
    options = SchedulerOptions(
        token_budget=settings.token_budget,
        max_num_running=settings.max_num_sequences,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        lookahead=settings.lookahead,
        recovery=Recovery[settings.recovery.name],
        shares_prefixes=settings.prefix_cache,
        quotas=settings.tenant_quotas,
    )
    return Scheduler(facts, options, trace=trace, clock=clock)
