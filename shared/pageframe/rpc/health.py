"""How a service is, by gRPC's health protocol: asked once from outside, or listened to by a peer.

    pageframe health ──Check──▶ any service: does it serve?
    gateway ──Watch, and Check now and then──▶ scheduler: does it run, and take, requests?

A scheduler serves two names: its own service, which stops serving when it drains, and the
executor's, which serves while an executor is connected. Whoever tells nothing of a name is taken
to be well. ``lifecycle`` answers.

The protocol: https://github.com/grpc/grpc/blob/master/doc/health-checking.md.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pageframe.rpc.channel import open_channel
from pageframe.rpc.tls import ClientTls

TIMEOUT_S: Final = 4.0
"""Less than the images give a check, which has to start Python, too."""

SCHEDULER_HEALTH: Final = "pageframe.v1.SchedulerService"
"""The name under which a scheduler tells whether it takes requests."""

EXECUTOR_HEALTH: Final = "pageframe.v1.ExecutorService"
"""The name under which a scheduler tells whether it has an executor."""

SILENCE_S: Final = 10.0
"""How long a scheduler may take to say anything at all."""

_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_PROBE_S: Final = 5.0


def ask_health(address: str, *, timeout_s: float = TIMEOUT_S, tls: ClientTls | None = None) -> str:
    """What a service says of itself: ``SERVING``, ``NOT_SERVING``, or why it could not be asked.

    Args:
        address: ``HOST:PORT`` or ``unix:/path``.
        timeout_s: How long to wait for the answer.
        tls: Whom to believe over TCP, and what to show; None for plain text.

    Raises:
        InvalidRequestError: as ``ClientTls.credentials``.
    """
    with open_channel(address, [("grpc.enable_http_proxy", 0)], tls) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


class SchedulerHealth:
    """The newest word on one scheduler, for as long as a channel to it holds.

    Args:
        on_change: Called whenever a word has changed.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._unwell: set[str] = set()

    @property
    def is_draining(self) -> bool:
        """Whether it ends what it has and takes no more."""
        return SCHEDULER_HEALTH in self._unwell

    @property
    def has_executor(self) -> bool:
        """Whether somebody computes its steps."""
        return EXECUTOR_HEALTH not in self._unwell

    def forget(self) -> None:
        """A new channel begins: nothing is known of who answers there."""
        self._unwell.clear()

    async def watch(self, channel: grpc.aio.Channel) -> None:
        """Listen until both streams have ended, as they do with the channel."""
        names = (SCHEDULER_HEALTH, EXECUTOR_HEALTH)
        await asyncio.gather(*(self._watch(channel, name) for name in names))

    async def probe(
        self, channel: grpc.aio.Channel, *, pause_s: float = _PROBE_S, silence_s: float = SILENCE_S
    ) -> None:
        """Ask every few seconds whether anybody is there; returns when nobody answers in time.

        A process that hangs, or a machine that has lost its power, closes no connection.
        """
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=silence_s)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    return
                # Whatever else it says, it does say something.
            await asyncio.sleep(pause_s)

    async def _watch(self, channel: grpc.aio.Channel, name: str) -> None:
        call = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=name)
        )
        try:
            async for response in call:
                self._take(name, is_well=response.status != _NOT_SERVING)
        except grpc.RpcError:
            # Either the channel is lost, which its owner notices, or nobody tells health there.
            return
        finally:
            call.cancel()

    def _take(self, name: str, *, is_well: bool) -> None:
        if is_well == (name not in self._unwell):
            return
        if is_well:
            self._unwell.discard(name)
        else:
            self._unwell.add(name)
        self._on_change()
