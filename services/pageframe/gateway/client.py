"""The gateway's stream to its scheduler: all requests of this process on one stream.

    submit ──▶ living ──▶ outbox ──▶ Connect ──▶ scheduler
    mailbox ◀── living ◀──────────── events ◀──┘

A lost stream is a stall, not an error: the living requests are submitted again on the next one,
with the tokens they have. Only when no stream comes up for ``lost_after_s`` do they fail. Where
there are several schedulers, whoever holds the links (``replicas``) may take requests away from
one and have another go on with them.
"""

import asyncio
from collections.abc import Callable

import grpc
import structlog

from pageframe.core.clock import Clock, SystemClock
from pageframe.core.errors import (
    PageframeError,
    PreconditionError,
    UnavailableError,
)
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Submission, TokenEvents
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.gateway.living import Living, LivingRequests, OnError, is_final
from pageframe.gateway.mailbox import Mailbox
from pageframe.rpc.channel import open_inner_channel
from pageframe.rpc.health import SILENCE_S, SchedulerHealth
from pageframe.rpc.orders import OrderQueue
from pageframe.rpc.status import from_rpc_error, stream_error
from pageframe.v1 import scheduler_service_pb2 as pb
from pageframe.v1 import scheduler_service_pb2_grpc
from pageframe.wire.replica import replica_from_proto
from pageframe.wire.request import events_from_proto, submission_to_proto

_log = structlog.get_logger(__name__)

_RECONNECT_DELAY_S = 0.05
_RECONNECT_DELAY_MAX_S = 0.5

_ConnectCall = grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]


def _ignore() -> None:
    return None


class SchedulerLink:
    """Requests out, token events in. For one event loop; ``run`` keeps it connected.

    Args:
        address: Where the scheduler listens, ``HOST:PORT`` or ``unix:/path``.
        gateway_id: Name of this gateway process, unlike that of any other one.
        lost_after_s: How long living requests wait for a scheduler that went away.
        open_channel: Makes the channel to an address.
        clock: Source of time.
        on_change: Called when the stream is up or lost, and when what it leads to, or how that is,
            has changed.
        on_error: Asked before a request ends with an error.
        has_others: Whether requests could go on elsewhere now; if so, a scheduler that is silent
            for long is taken to be lost. None where there is never another one: then there is
            nothing to do about how it is, and it is not asked.
    """

    def __init__(
        self,
        address: str,
        *,
        gateway_id: str,
        lost_after_s: float = 30.0,
        open_channel: Callable[[str], grpc.aio.Channel] = open_inner_channel,
        clock: Clock | None = None,
        on_change: Callable[[], None] = _ignore,
        on_error: OnError = is_final,
        has_others: Callable[[], bool] | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._on_change = on_change
        self._has_others = has_others
        self._health = SchedulerHealth(on_change)
        self._address = address
        self._open_channel = open_channel
        self._gateway_id = gateway_id
        self._lost_after_s = lost_after_s
        self._facts: ReplicaFacts | None = None
        self._ready = asyncio.Event()
        self._living = LivingRequests(on_error)
        self._outbox = OrderQueue(_join)
        self._is_connected = False
        self._is_lost = False
        self._silent_ns = 0
        self._give_up_timer: asyncio.TimerHandle | None = None

    @property
    def facts(self) -> ReplicaFacts:
        """What the replica serves.

        Raises:
            UnavailableError: reason NOT_READY, before the first hello.
        """
        if self._facts is None:
            raise UnavailableError("NOT_READY", "the scheduler has not answered yet; try again")
        return self._facts

    @property
    def served(self) -> tuple[ReplicaFacts, ...]:
        """What is served, one for each model; nothing before the first hello."""
        return () if self._facts is None else (self._facts,)

    @property
    def is_connected(self) -> bool:
        """Whether the stream is up."""
        return self._is_connected

    @property
    def is_running(self) -> bool:
        """Whether requests make progress there: it is connected, and has an executor."""
        return self._is_connected and self._health.has_executor

    @property
    def is_open(self) -> bool:
        """Whether it is a place for another request."""
        return self.is_running and not self._health.is_draining

    @property
    def is_lost(self) -> bool:
        """Whether it has been away for too long: nothing waits for it any more."""
        return self._is_lost

    @property
    def num_living(self) -> int:
        """Requests that have not ended."""
        return len(self._living)

    async def wait_ready(self) -> None:
        """Wait for the first hello."""
        await self._ready.wait()

    def submit(self, submission: Submission, mailbox: Mailbox) -> int:
        """Send a request; its tokens go into ``mailbox``. Sets and returns its handle.

        Raises:
            UnavailableError: reason SCHEDULER_LOST, when it has been away for too long.
        """
        if self._is_lost:
            raise self._lost_error()
        handle = self._living.add(submission, mailbox)
        living = self._living.get(handle)
        if self._is_connected and living is not None:
            self._send_living(living)
        return handle

    def get(self, handle: int) -> Living | None:
        """The living request of a handle."""
        return self._living.get(handle)

    def release(self, handle: int) -> Living | None:
        """Give away a request, which goes on elsewhere; None when it has ended."""
        living = self._living.release(handle)
        if living is not None and self._is_connected:
            self._send_cancel(handle, None)
        return living

    def adopt(self, living: Living) -> int:
        """Go on with a request of another link; it waits while this one is not connected."""
        handle = self._living.adopt(living)
        if self._is_connected:
            self._send_living(living)
        return handle

    def cancel(self, handle: int, sample_index: int | None = None) -> None:
        """Take back a request, at once and for ever; or one sample, whose completion still comes.

        Nothing happens for a request that has ended.
        """
        if not self._living.take_back(handle, sample_index):
            return
        if self._is_connected:
            self._send_cancel(handle, sample_index)
        elif sample_index is not None:
            self._living.settle_endings()

    async def run(self) -> None:
        """Stay connected until cancelled."""
        delay_s = _RECONNECT_DELAY_S
        self._start_give_up_timer()
        while True:
            try:
                async with self._open_channel(self._address) as channel:
                    call = await self._open(channel)
                    delay_s = _RECONNECT_DELAY_S
                    await self._use(call, channel)
            except PageframeError as error:
                _log.warning("scheduler_lost", reason=error.reason, message=error.message)
            finally:
                self._disconnected()
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _RECONNECT_DELAY_MAX_S)

    async def _open(self, channel: grpc.aio.Channel) -> _ConnectCall:
        call = scheduler_service_pb2_grpc.SchedulerServiceStub(channel).Connect(wait_for_ready=True)
        hello = pb.GatewayHello(gateway_id=self._gateway_id)
        try:
            await call.write(pb.ConnectRequest(hello=hello))
            response = await call.read()
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        if not isinstance(response, pb.ConnectResponse):
            raise await stream_error(call)
        if not response.HasField("hello"):
            raise PreconditionError("HELLO_EXPECTED", "the scheduler did not begin with a hello")
        self._set_facts(response.hello)
        return call

    async def _use(self, call: _ConnectCall, channel: grpc.aio.Channel) -> None:
        """Carry requests and events until the stream is lost."""
        self._connected()
        tasks = [
            asyncio.create_task(self._write_all(call)),
            asyncio.create_task(self._read_all(call)),
        ]
        if self._has_others is not None:
            tasks.append(asyncio.create_task(self._watch(channel, self._has_others)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()

    async def _watch(self, channel: grpc.aio.Channel, has_others: Callable[[], bool]) -> None:
        """Hear how it is, until it is silent for long while others could do its work."""
        hearing = asyncio.create_task(self._health.watch(channel))
        try:
            while True:
                await self._health.probe(channel)
                if has_others():
                    self._silent_ns = round(SILENCE_S * NANOSECONDS_PER_SECOND)
                    raise UnavailableError("SCHEDULER_SILENT", "the scheduler answers no more")
        finally:
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)

    async def _write_all(self, call: _ConnectCall) -> None:
        try:
            await self._outbox.write_all(call.write)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.InvalidStateError as error:
            # This is how grpc.aio reports a write on a call that has ended.
            raise await stream_error(call) from error

    async def _read_all(self, call: _ConnectCall) -> None:
        while True:
            try:
                response = await call.read()
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error
            if not isinstance(response, pb.ConnectResponse):
                raise await stream_error(call)
            if response.HasField("events"):
                self._on_events(events_from_proto(response.events))
            else:
                self._set_facts(response.hello)
                self._on_change()

    def _set_facts(self, hello: pb.ConnectHello) -> None:
        self._facts = replica_from_proto(hello.replica)
        self._ready.set()

    def _connected(self) -> None:
        """Submit all living requests, with the tokens they have."""
        if self._give_up_timer is not None:
            self._give_up_timer.cancel()
            self._give_up_timer = None
        self._is_connected, self._is_lost = True, False
        self._outbox.clear()
        self._health.forget()
        for living in self._living:
            self._send_living(living)
        _log.info("scheduler_connected", num_requests=len(self._living))
        self._on_change()

    def _disconnected(self) -> None:
        if self._is_connected:
            self._is_connected = False
            lost_ns = self._clock.now_ns() - self._silent_ns
            self._silent_ns = 0
            for living in self._living:
                living.mailbox.lost_ns = lost_ns
            self._start_give_up_timer()
        self._living.settle_endings()
        self._on_change()

    def _start_give_up_timer(self) -> None:
        loop = asyncio.get_running_loop()
        self._give_up_timer = loop.call_later(self._lost_after_s, self._give_up)

    def _give_up(self) -> None:
        self._is_lost = True
        self._living.fail_all(self._lost_error())

    def _lost_error(self) -> UnavailableError:
        return UnavailableError(
            "SCHEDULER_LOST",
            f"the scheduler has been away for {self._lost_after_s:g} s; try again",
            lost_after_s=self._lost_after_s,
        )

    def _send_living(self, living: Living) -> None:
        self._outbox.put(pb.ConnectRequest(submit=submission_to_proto(living.resubmission())))
        living.is_sent = True
        for sample_index in living.ended_samples | living.ending_samples:
            self._send_cancel(living.submission.handle, sample_index)

    def _send_cancel(self, handle: int, sample_index: int | None) -> None:
        cancel = pb.CancelSubmission(handle=handle, sample_index=sample_index)
        self._outbox.put(pb.ConnectRequest(cancel=cancel))

    def _on_events(self, events: TokenEvents) -> None:
        for handle in self._living.take_events(events):
            self.cancel(handle)


def _join(orders: list[pb.ConnectRequest]) -> pb.ConnectRequest:
    return pb.ConnectRequest(orders=pb.ConnectOrders(orders=orders))
