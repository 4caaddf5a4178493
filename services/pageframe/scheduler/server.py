"""The scheduler process: connect to the executor, serve gateways."""

import functools
from collections.abc import Callable, Sequence

import grpc
import structlog

from pageframe.config.launch import Launch
from pageframe.config.option_types import SpeculationName
from pageframe.config.settings import Settings
from pageframe.core.clock import Clock, SystemClock
from pageframe.core.errors import InvalidRequestError
from pageframe.core.journal import MemorySetup
from pageframe.core.replica import ReplicaFacts, TenantQuota
from pageframe.core.terms import TenantTerms
from pageframe.core.trace import TraceSink
from pageframe.core.units import NANOSECONDS_PER_MILLISECOND, NANOSECONDS_PER_SECOND
from pageframe.rpc.access_file import AccessFile
from pageframe.rpc.health import EXECUTOR_HEALTH
from pageframe.rpc.lifecycle import Service, TellHealth, serve
from pageframe.scheduler.client import GrpcExecutorStream
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.journal import JournalFile, RecordingScheduler
from pageframe.scheduler.loop import ExecutorStream, OpenStream, SchedulerLoop
from pageframe.scheduler.options import SchedulerOptions
from pageframe.scheduler.policies.chosen import check_names
from pageframe.scheduler.policies.guard import PolicyFault
from pageframe.scheduler.servicer import SchedulerServicer
from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import Reading
from pageframe.telemetry.metrics_door import MetricsDoor
from pageframe.telemetry.metrics_text import MetricsText
from pageframe.telemetry.sink import RingTraceSink
from pageframe.telemetry.spans import SERVICE_SCHEDULER
from pageframe.v1 import scheduler_service_pb2_grpc

_log = structlog.get_logger(__name__)

SERVICE_NAMES = ("pageframe.v1.SchedulerService",)


async def serve_scheduler(launch: Launch) -> None:
    """Serve until told to stop."""
    settings = launch.settings
    clock = SystemClock()
    # Before anybody waits for an executor only to be told then.
    access_file = AccessFile(settings.api_keys)
    options = make_options(settings)
    check_names(options.policies, options.shadow_policies)
    journal = open_journal(settings)
    trace = RingTraceSink.create(launch.ring_path("scheduler"), SERVICE_SCHEDULER, settings.trace)

    def terms() -> TenantTerms:
        return access_file.access.terms.over(terms_of(settings))

    def build(facts: ReplicaFacts) -> Scheduler:
        return make_scheduler(facts, settings, trace, clock, journal, terms())

    open_stream = stream_opener(launch, lambda: terms().quotas)
    loop = SchedulerLoop(open_stream, make_scheduler=build, clock=clock)
    access_file.on_change(lambda _: loop.set_terms(terms()))
    servicer = SchedulerServicer(loop, clock)

    def begin_health(tell: TellHealth) -> None:
        # A gateway with another replica has requests go on there while this executor is away.
        tell(EXECUTOR_HEALTH, loop.is_connected)
        loop.on_executor = functools.partial(tell, EXECUTOR_HEALTH)

    def register(server: grpc.aio.Server) -> None:
        scheduler_service_pb2_grpc.add_SchedulerServiceServicer_to_server(servicer, server)

    async def drain() -> None:
        await servicer.drain(settings.drain_timeout_seconds)

    text = MetricsText(
        lambda: (*loop.readings(), Reading(metrics.DROPPED_RECORDS, trace.num_dropped))
    )
    metrics_door = MetricsDoor(
        settings.metrics_port_of("scheduler"), text.render, host=settings.metrics_host
    )

    async def start() -> None:
        await metrics_door.start()
        await loop.start()

    async def close() -> None:
        await metrics_door.stop()
        if journal is not None:
            journal.close()
        trace.close()

    await serve(
        Service(
            name=SERVICE_SCHEDULER,
            address=launch.scheduler_address,
            service_names=SERVICE_NAMES,
            register=register,
            begin_health=begin_health,
            start=start,
            drain=drain,
            close=close,
            drain_timeout_s=settings.drain_timeout_seconds,
            background=[loop.wait_ended, access_file.watch],
            tls=settings.server_tls(),
            keepalive=settings.keepalive(),
        )
    )


def stream_opener(launch: Launch, quotas: Callable[[], Sequence[TenantQuota]]) -> OpenStream:
    """Connects to the executor of a launch under an epoch, with the quotas as they are then."""
    open_channel = launch.settings.inner_channels()

    async def open_stream(epoch: int) -> ExecutorStream:
        return await GrpcExecutorStream.open(
            launch.executor_address,
            launch.settings.model,
            epoch,
            quotas=quotas(),
            open_channel=open_channel,
        )

    return open_stream


def make_scheduler(
    facts: ReplicaFacts,
    settings: Settings,
    trace: TraceSink,
    clock: Clock,
    journal: JournalFile | None = None,
    terms: TenantTerms | None = None,
) -> Scheduler:
    """The pure core as the settings want it; with a journal, it records."""
    options = make_options(settings, terms)
    if journal is None:
        return Scheduler(facts, options, trace=trace, clock=clock)
    memory = MemorySetup(
        eviction_policy=settings.eviction_policy,
        session_ttl_ns=round(settings.session_ttl_seconds * NANOSECONDS_PER_SECOND),
        session_idle_ns=round(settings.session_idle_seconds * NANOSECONDS_PER_SECOND),
        num_blocks_max=settings.num_blocks_max,
    )
    return RecordingScheduler(
        facts,
        options,
        trace=trace,
        clock=clock,
        journal=journal,
        memory=memory,
        settings_json=settings.model_dump_json(by_alias=True, exclude_none=True),
    )


def open_journal(settings: Settings) -> JournalFile | None:
    """The file to record in, if there is to be one.

    Raises:
        InvalidRequestError: RECORD_UNWRITABLE.
    """
    if settings.record is None:
        return None
    try:
        return JournalFile(settings.record)
    except OSError as error:
        raise InvalidRequestError(
            "RECORD_UNWRITABLE",
            f"cannot record in {settings.record}: {error.strerror}",
            path=str(settings.record),
        ) from None


def terms_of(settings: Settings) -> TenantTerms:
    """The terms of tenants as the settings have them."""
    return TenantTerms(weights=dict(settings.tenant_weights), quotas=settings.tenant_quotas)


def make_options(settings: Settings, terms: TenantTerms | None = None) -> SchedulerOptions:
    """Options of the core as the settings want them, and ``terms`` for tenants if there are any."""
    terms = terms or terms_of(settings)
    return SchedulerOptions(
        token_budget=settings.token_budget,
        max_num_running=settings.max_num_sequences,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        target_itl_ns=round(settings.target_itl_ms * NANOSECONDS_PER_MILLISECOND),
        num_draft_tokens=0
        if settings.speculation is SpeculationName.OFF
        else settings.num_draft_tokens,
        lookahead=settings.lookahead,
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        tenant_weights=terms.weights,
        priority_ageing_ns=round(settings.priority_ageing_seconds * NANOSECONDS_PER_SECOND),
        policies={
            "order": settings.order_policy,
            "admission": settings.admission_policy,
            "victim": settings.victim_policy,
            "recovery": settings.recovery,
        },
        shadow_policies=dict(settings.shadow_policy),
        on_policy_fault=_log_policy_fault,
        shares_prefixes=settings.prefix_cache,
        quotas=terms.quotas,
        rates=terms.rates,
    )


def _log_policy_fault(fault: PolicyFault) -> None:
    _log.error(
        "policy_broken",
        group=fault.group,
        policy=fault.name,
        is_shadow=fault.is_shadow,
        reason=fault.why,
    )
