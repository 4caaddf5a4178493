"""The life of a gRPC server process, the same for every service.

    build ─▶ listen, health NOT_SERVING ─▶ warm up ─▶ SERVING ─▶ SIGTERM ─▶ NOT_SERVING
          ─▶ drain (bounded) ─▶ stop ─▶ release

A service brings its servicers and up to three coroutines; everything else happens here.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pageframe.config.cores import give_way
from pageframe.core.errors import PageframeError, UnavailableError
from pageframe.rpc.channel import MESSAGE_OPTIONS
from pageframe.rpc.keepalive import Keepalive
from pageframe.rpc.listening import listen
from pageframe.rpc.ready import announce_failure, announce_ready
from pageframe.rpc.tls import ServerTls

_log = structlog.get_logger(__name__)

_SWITCH_INTERVAL_S = 0.0005


TellHealth = Callable[[str, bool], None]
"""Says of a name in gRPC's health service whether it is served now."""


async def _nothing() -> None:
    return None


def _tell_nothing(_tell: TellHealth) -> None:
    return None


@dataclass(slots=True, kw_only=True)
class Service:
    """What one process serves.

    Attributes:
        name: For logs, for example ``pageframe-gateway``.
        address: ``HOST:PORT`` (port 0 picks a free one) or ``unix:/path``.
        service_names: Full names of the gRPC services, for health and reflection.
        register: Adds servicers to the server.
        start: Runs after the server listens and before it says SERVING.
        drain: Runs after it says NOT_SERVING; ends when all work is done.
        close: Runs last, always.
        drain_timeout_s: Bound on ``drain``.
        background: Tasks that must not end while the service runs; if one fails, the service
            stops with that error.
        begin_health: Given how to say of further names whether they are served, before ``start``;
            for what comes and goes while the service runs, such as whom it depends on.
        details: What its ready line says besides, by name, once it has started: ``http`` for where
            it serves HTTP, ``kernels`` for what computes.
        tls: What it shows to callers over TCP; None for plain text.
        keepalive: How soon a caller that has vanished is noticed; None where callers are from
            outside.
    """

    name: str
    address: str
    service_names: tuple[str, ...]
    register: Callable[[grpc.aio.Server], None]
    start: Callable[[], Awaitable[None]] = _nothing
    drain: Callable[[], Awaitable[None]] = _nothing
    close: Callable[[], Awaitable[None]] = _nothing
    drain_timeout_s: float = 30.0
    background: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    begin_health: Callable[[TellHealth], None] = _tell_nothing
    details: Callable[[], Mapping[str, str]] = dict
    tls: ServerTls | None = None
    keepalive: Keepalive | None = None


async def serve(service: Service) -> None:
    """Run a service until SIGTERM or SIGINT, or until a background task fails.

    Raises:
        PreconditionError: ADDRESS_IN_USE, or whatever ``start`` or a background task raises.
        InvalidRequestError: files of TLS are amiss.
    """
    stop = asyncio.Event()
    main = asyncio.current_task()
    assert main is not None, "a coroutine runs in a task"

    def on_signal() -> None:
        # While it starts nobody waits for the event: what it waits for may never come.
        stop.set()
        if not is_up:
            main.cancel()

    is_up = False
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        async with running(service) as (address, failed):
            is_up = True
            details = service.details()
            announce_ready(address, details)
            _log.info("serving", service=service.name, address=address, **details)
            stopped = asyncio.create_task(stop.wait())
            waits: tuple[asyncio.Future[Any], ...] = (stopped, failed)
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if failed.done():
                failed.result()
    except asyncio.CancelledError:
        if is_up or not stop.is_set():
            raise
        _log.info("stopped_while_starting", service=service.name)


@contextlib.asynccontextmanager
async def running(
    service: Service,
) -> AsyncIterator[tuple[str, "asyncio.Future[None]"]]:
    """Serve while the block runs; yields the bound address and a future that fails with a task."""
    pings = [] if service.keepalive is None else service.keepalive.options()
    server = grpc.aio.server(options=[*MESSAGE_OPTIONS, ("grpc.so_reuseport", 0), *pings])
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection(
        (*service.service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    service.register(server)
    address = listen(server, service.address, service.tls)
    await _set_health(health_servicer, service, serving=False)
    await server.start()
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    tasks: list[asyncio.Task[None]] = []
    try:
        service.begin_health(_teller(health_servicer))
        await service.start()
        tasks = [_watch(run, failed) for run in service.background]
        await _set_health(health_servicer, service, serving=True)
        yield address, failed
        await _set_health(health_servicer, service, serving=False)
        await _drain(service)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.stop(grace=1.0)
        await service.close()
        if not failed.done():
            failed.cancel()


def use_short_switch_interval() -> None:
    """Keep a step thread from waiting long for the event loop's thread, or the other way round.

    A thread that comes back from a call that released the interpreter lock waits up to one switch
    interval for a thread that is busy; at the usual 5 ms a few dozen calls cost more than a step.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def run_service(name: str, main: Callable[[], Awaitable[None]]) -> None:
    """Entry point of a service process: run ``main``, report failure in one line, set exit code.

    The exit code is as ``ready.announce_failure`` says.
    """
    use_short_switch_interval()
    give_way()
    try:
        asyncio.run(_as_coroutine(main))
    except PageframeError as error:
        _log.error("failed", service=name, reason=error.reason, message=error.message)
        raise SystemExit(announce_failure(error)) from error
    except Exception as error:
        _log.exception("failed", service=name)
        raise SystemExit(announce_failure(error)) from error


async def _as_coroutine(main: Callable[[], Awaitable[None]]) -> None:
    await main()


def _teller(servicer: "health.aio.HealthServicer") -> TellHealth:
    """Sets health from code that does not wait, in the order of the calls."""
    response = health_pb2.HealthCheckResponse
    setting: set[asyncio.Task[None]] = set()

    def tell(name: str, is_served: bool) -> None:
        status = response.SERVING if is_served else response.NOT_SERVING
        task = asyncio.create_task(servicer.set(name, status))
        setting.add(task)
        task.add_done_callback(setting.discard)

    return tell


async def _set_health(
    servicer: "health.aio.HealthServicer", service: Service, *, serving: bool
) -> None:
    response = health_pb2.HealthCheckResponse
    status = response.SERVING if serving else response.NOT_SERVING
    for name in ("", *service.service_names):
        await servicer.set(name, status)


async def _drain(service: Service) -> None:
    try:
        async with asyncio.timeout(service.drain_timeout_s):
            await service.drain()
    except TimeoutError:
        _log.warning("drain_timeout", service=service.name, timeout_s=service.drain_timeout_s)


def _watch(
    run: Callable[[], Awaitable[None]], failed: "asyncio.Future[None]"
) -> "asyncio.Task[None]":
    async def guarded() -> None:
        try:
            await run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if not failed.done():
                failed.set_exception(error)
            return
        if not failed.done():
            failed.set_exception(UnavailableError("BACKGROUND_ENDED", "a background task ended"))

    return asyncio.create_task(guarded())
