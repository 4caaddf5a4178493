"""The network between the processes of a simulation: who listens where, and every call alive.

    Channel ─▶ Network ─▶ ClientCall ─▶ servicer of a living process

It keeps order on each stream, as gRPC does, and promises nothing else.
"""

import asyncio
import random
from collections.abc import Callable
from typing import Any, cast

import grpc

from pageframe.lab.simulation.call import ClientCall, Metadata, Status
from pageframe.lab.simulation.event_log import EventLog
from pageframe.lab.simulation.virtual_time import Process

_GONE = Status(grpc.StatusCode.UNAVAILABLE, "the connection is gone")
_NOBODY = Status(grpc.StatusCode.UNAVAILABLE, "nobody listens there")


class Network:
    """Everything on the wire.

    Args:
        loop: Tells the time.
        random_source: Draws delays, windows and orders.
        log: Takes every message that arrives.
        delay_s: Longest delay of a message.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        random_source: random.Random,
        log: EventLog,
        *,
        delay_s: float,
    ) -> None:
        self.loop = loop
        self.violations: list[str] = []
        self._random = random_source
        self._log = log
        self._delay_s = delay_s
        self._listeners: dict[str, list[tuple[Process, object]]] = {}
        self._waiting: list[tuple[str, ClientCall, bool]] = []
        self._calls: dict[ClientCall, None] = {}

    # For whoever serves and calls.

    def listen(self, address: str, process: Process, servicer: object) -> None:
        """Serve at an address; several may, and a call goes to one of them."""
        self._listeners.setdefault(address, []).append((process, servicer))
        self.note(f"{process.name} listens")
        waiting, self._waiting = self._waiting, []
        for name, call, streams_requests in waiting:
            self._connect(name, call, streams_requests=streams_requests, waits=True)

    def channel(self, client: Process, address: str) -> grpc.aio.Channel:
        """A channel of a process to an address."""
        return cast("grpc.aio.Channel", Channel(self, client, address))

    def open_channel(self, client: Process) -> Callable[[str], grpc.aio.Channel]:
        """What makes channels for a process."""
        return lambda address: self.channel(client, address)

    def call(
        self,
        client: Process,
        address: str,
        method: str,
        parse_response: Callable[[bytes], object],
        *,
        streams_requests: bool,
        waits: bool,
        timeout_s: float | None,
        metadata: Metadata,
    ) -> ClientCall:
        """Begin a call; with ``waits`` it waits until somebody listens."""
        call = ClientCall(
            self, client, method, parse_response, timeout_s=timeout_s, metadata=metadata
        )
        self._forget_ended()
        self._connect(address, call, streams_requests=streams_requests, waits=waits)
        return call

    # For whoever does harm.

    def sever(self, first: str, second: str) -> int:
        """Cut all calls between processes with these names' beginnings; how many there were."""
        num_cut = 0
        for call in list(self._calls):
            names = (call.client.name, call.server.name if call.server is not None else "")
            if not call.done() and (
                (names[0].startswith(first) and names[1].startswith(second))
                or (names[0].startswith(second) and names[1].startswith(first))
            ):
                call.cut(_GONE, keeps_in_flight=self.flip())
                num_cut += 1
        return num_cut

    def bury(self, process: Process) -> None:
        """Take a process off the network: nothing of it is sent or heard any more."""
        for listeners in self._listeners.values():
            listeners[:] = [entry for entry in listeners if entry[0] is not process]
        self._waiting = [entry for entry in self._waiting if entry[1].client is not process]
        for call in list(self._calls):
            if process in (call.client, call.server):
                call.cut(_GONE, keeps_in_flight=self.flip())

    # For calls.

    def draw_delay(self) -> float:
        """Seconds until the next message arrives."""
        return self._random.random() * self._delay_s

    def draw_window(self) -> int:
        """Messages of a stream that may be under way."""
        return self._random.choice((1, 2, 8, 64))

    def flip(self) -> bool:
        """One of two orders in which things may happen."""
        return self._random.random() < 0.5

    def note(self, line: str, data: bytes = b"") -> None:
        """Write down what arrived."""
        self._log.note(self.loop.time(), line, data)

    def fail(self, line: str) -> None:
        """Report what must not happen."""
        self.violations.append(line)

    def _connect(
        self, address: str, call: ClientCall, *, streams_requests: bool, waits: bool
    ) -> None:
        listeners = self._listeners.get(address)
        if listeners:
            server, servicer = self._random.choice(listeners)
            self._calls[call] = None
            call.serve(server, servicer, streams_requests=streams_requests)
        elif waits:
            if not call.done():
                self._waiting.append((address, call, streams_requests))
        else:
            call.refuse(_NOBODY)

    def _forget_ended(self) -> None:
        for call in [call for call in self._calls if call.is_over]:
            del self._calls[call]


class Channel:
    """The part of ``grpc.aio.Channel`` that generated stubs and our code use."""

    def __init__(self, network: Network, client: Process, address: str) -> None:
        self._network = network
        self._client = client
        self._address = address
        self._calls: list[ClientCall] = []

    def stream_stream(self, method: str, **serialisers: Any) -> Callable[..., ClientCall]:
        """A method with streams both ways."""

        def begin(*, wait_for_ready: bool = False, **options: Any) -> ClientCall:
            return self._begin(method, serialisers, True, wait_for_ready, options)

        return begin

    def unary_stream(self, method: str, **serialisers: Any) -> Callable[..., Any]:
        """A method with one request and a stream of responses."""

        def begin(request: Any, *, wait_for_ready: bool = False, **options: Any) -> Any:
            call = self._begin(method, serialisers, False, wait_for_ready, options)
            return _UnaryStreamCall(call, request)

        return begin

    def unary_unary(self, method: str, **serialisers: Any) -> Callable[..., Any]:
        """A method with one request and one response."""

        async def call_once(request: Any, *, wait_for_ready: bool = False, **options: Any) -> Any:
            call = self._begin(method, serialisers, False, wait_for_ready, options)
            (response,) = [response async for response in _UnaryStreamCall(call, request)]
            return response

        return call_once

    async def close(self) -> None:
        """End all calls."""
        for call in self._calls:
            call.cancel()

    async def __aenter__(self) -> "Channel":
        """Begin."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """End all calls."""
        await self.close()

    def _begin(
        self,
        method: str,
        serialisers: dict[str, Any],
        streams_requests: bool,
        waits: bool,
        options: dict[str, Any],
    ) -> ClientCall:
        call = self._network.call(
            self._client,
            self._address,
            method,
            serialisers["response_deserializer"],
            streams_requests=streams_requests,
            waits=waits,
            timeout_s=options.get("timeout"),
            metadata=tuple(options.get("metadata") or ()),
        )
        self._calls.append(call)
        return call


class _UnaryStreamCall:
    """A call that is given its one request when it is first iterated."""

    def __init__(self, call: ClientCall, request: object) -> None:
        self._call = call
        self._request = request

    async def __aiter__(self) -> Any:
        """All responses."""
        if not self._call.done():
            await self._call.write(self._request)
            await self._call.done_writing()
        async for response in self._call:
            yield response

    def cancel(self) -> bool:
        """Go away."""
        return self._call.cancel()
