"""All generations of one client on one stream: a step of 64 of them is one read, not 64.

    generate ──start──▶ outbox ──▶ GenerateMany ──▶ gateway
    generate ◀── inbox ◀── reader ◀──────────────────┘

The stream is opened for the first generation and ended behind the last: a client that waits for
nothing holds nothing, and has nothing to tidy up. When it breaks all of them fail alike, and each
goes on by itself (``attempts``), on the next stream.

gRPC forgets how a call has ended when a write meets its end: it says INTERNAL then (grpcio 1.85).
So nothing is written to a client's first stream, nor to the one behind one that broke, before the
server has accepted it: a refusal is heard as it was said. Where a write meets the end of a stream
that was accepted, the stream is broken, whatever gRPC says.

Whoever reads slowly holds up nobody else: its events wait in its inbox, at most as many as the
tokens that it has asked for, and whoever takes them decodes them. Whoever wants nothing before the
end leaves them there until then, and is woken once, not for each token.
"""

import asyncio
import itertools
import sys
from collections.abc import AsyncGenerator, Callable

import grpc

from pageframe.client.convert import events_from_proto, request_to_proto
from pageframe.client.sync import remaining_s
from pageframe.client.types import Event, GenerationRequest
from pageframe.core.errors import (
    CancelledError,
    DeadlineError,
    InvalidRequestError,
    PageframeError,
    UnavailableError,
    UnimplementedError,
)
from pageframe.core.limits import LIMITS
from pageframe.rpc.orders import OrderQueue
from pageframe.rpc.status import from_rpc_error, make_error
from pageframe.v1 import gateway_service_pb2 as pb
from pageframe.v1 import gateway_service_pb2_grpc

_ManyCall = grpc.aio.StreamStreamCall[pb.GenerateManyRequest, pb.GenerateManyResponse]
# A longer time is as good as any; it keeps nanoseconds within 64 bits.
_TIMEOUT_MAX_S = 366 * 24 * 3600
_Metadata = tuple[tuple[str, str], ...]


class ManyGenerations:
    """The generations of one client; for one event loop.

    Args:
        stub: Of the gateway.
        metadata: Sent with each stream.

    Attributes:
        is_offered: Whether the server has the method, as far as is known.
    """

    def __init__(
        self, stub: "gateway_service_pb2_grpc.GatewayServiceAsyncStub", metadata: _Metadata
    ) -> None:
        self.is_offered = True
        self._stub = stub
        self._metadata = metadata
        self._stream: _Stream | None = None

    async def generate(
        self, request: GenerationRequest, deadline_s: float | None, *, at_end: bool = False
    ) -> AsyncGenerator[list[Event], None]:
        """One attempt at a generation: events that are there together, one or more.

        Deltas of a sample that are there together are one, except for text without tokens.

        Close the iterator to take it back.

        Args:
            request: What to ask.
            deadline_s: When its time is over, by the clock of the event loop; None for never.
            at_end: Whether to yield nothing before all has come, or it has failed.

        Raises:
            PageframeError: as the server says; or the stream broke, or time was over.
        """
        loop = asyncio.get_running_loop()
        timeout_s = remaining_s(deadline_s, loop.time())
        start = pb.GenerateStart(request=request_to_proto(request), traceparent=_traceparent())
        if timeout_s is not None and timeout_s < _TIMEOUT_MAX_S:
            start.timeout.FromNanoseconds(round(timeout_s * 1e9))
        _check_size(start)
        inbox = _Inbox(max(1, request.num_outputs), at_end=at_end)
        stream = self._open_stream()
        handle = stream.start(start, inbox)
        # A server that is silent is not waited for either.
        timer = None if deadline_s is None else loop.call_at(deadline_s, inbox.fail, _late())
        try:
            while parts := await inbox.take():
                yield events_from_proto(parts)
        finally:
            if timer is not None:
                timer.cancel()
            await stream.leave(handle)
            if stream.is_unknown:
                self.is_offered = False

    async def close(self) -> None:
        """End all that live."""
        if self._stream is not None:
            await self._stream.close()

    def _open_stream(self) -> "_Stream":
        last = self._stream
        if last is not None and last.is_open:
            return last
        call = self._stub.GenerateMany(metadata=self._metadata)
        self._stream = _Stream(call, waits=last is None or not last.is_accepted)
        return self._stream


class _Inbox:
    """What has come for one generation and was not taken yet.

    Args:
        num_outputs: Samples that have not ended.
        at_end: Whether nothing is taken before the last one has.
    """

    __slots__ = ("_at_end", "_error", "_filled", "_num_open", "_parts")

    def __init__(self, num_outputs: int, *, at_end: bool = False) -> None:
        self._num_open = num_outputs
        self._at_end = at_end
        self._parts: list[pb.GeneratePart] = []
        self._error: PageframeError | None = None
        self._filled = asyncio.Event()

    def put(self, part: pb.GeneratePart, kind: str | None) -> bool:
        """Add a part that is no failure; whether it is the last one."""
        self._parts.append(part)
        if kind == "completion":
            self._num_open -= 1
        is_over = self._num_open == 0
        # What nobody knows might be the end: decoding it fails.
        if is_over or kind is None or not self._at_end:
            self._filled.set()
        return is_over

    def fail(self, error: PageframeError) -> None:
        """End it with an error, behind what has come; the first one stays."""
        self._error = self._error or error
        self._filled.set()

    async def take(self) -> list[pb.GeneratePart]:
        """Wait for parts and take them all; nothing behind the last one.

        Raises:
            PageframeError: it has failed.
        """
        while True:
            await self._filled.wait()
            if self._parts or self._num_open == 0:
                parts, self._parts = self._parts, []
                return parts
            if self._error is not None:
                raise self._error
            self._filled.clear()


class _Stream:
    """One stream, open while something lives on it.

    Args:
        call: Just begun.
        waits: Whether nothing is written before the server has accepted it.

    Attributes:
        is_open: Whether another generation may begin on it.
        is_accepted: Whether the server has accepted it, and it did not break.
        is_unknown: Whether the server has no such method.
    """

    def __init__(self, call: _ManyCall, *, waits: bool) -> None:
        self.is_open = True
        self.is_accepted = False
        self.is_unknown = False
        self._may_write = asyncio.Event()
        if not waits:
            self._may_write.set()
        self._write_failed = False
        self._call = call
        self._handles = itertools.count(1)
        self._living: dict[int, _Inbox] = {}
        self._outbox = OrderQueue(_join)
        self._task = asyncio.create_task(self._run())

    def start(self, start: pb.GenerateStart, inbox: _Inbox) -> int:
        """Begin a generation; sets and returns its handle."""
        start.handle = next(self._handles)
        self._living[start.handle] = inbox
        self._outbox.put(pb.GenerateManyRequest(start=start))
        return start.handle

    async def leave(self, handle: int) -> None:
        """Take back a generation unless it has ended; with the last one the stream ends."""
        if self._living.pop(handle, None) is not None:
            self._outbox.put(pb.GenerateManyRequest(cancel=pb.GenerateCancel(handle=handle)))
        if not self._living:
            self._end()
            await asyncio.wait((self._task,))

    async def close(self) -> None:
        """End it, with all that live on it."""
        self._fail_all(_closed)
        self._end()
        await asyncio.wait((self._task,))

    def _end(self) -> None:
        self.is_open = False
        self._call.cancel()

    async def _run(self) -> None:
        writer = asyncio.create_task(self._write_all())
        try:
            await self._read_all()
        except grpc.RpcError as error:
            self._break(error)
        finally:
            # Nothing lives unless this task was cancelled, as a loop does that ends.
            self._fail_all(_closed)
            self._end()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write_all(self) -> None:
        await self._may_write.wait()
        try:
            await self._outbox.write_all(self._call.write)
        except (grpc.RpcError, asyncio.InvalidStateError):
            # The reader hears of the end, too.
            self._write_failed = True

    async def _read_all(self) -> None:
        while self._living:
            response = await self._call.read()
            if not isinstance(response, pb.GenerateManyResponse):
                self._fail_all(
                    lambda: UnavailableError(
                        "STREAM_ENDED", "the server ended the stream too early"
                    )
                )
                return
            if not self.is_accepted:
                self.is_accepted = True
                self._may_write.set()
            for part in response.parts:
                self._take(part)

    def _break(self, error: grpc.RpcError) -> None:
        """End all that live as the stream has ended."""
        self.is_accepted = False
        told = from_rpc_error(error)
        self.is_unknown = isinstance(told, UnimplementedError)
        if self._write_failed and told.reason == "TRANSPORT":
            message = "the stream broke while it was written to"
            self._fail_all(lambda: UnavailableError("STREAM_BROKEN", message))
        else:
            self._fail_all(lambda: from_rpc_error(error))

    def _take(self, part: pb.GeneratePart) -> None:
        inbox = self._living.get(part.handle)
        if inbox is None:
            # It was taken back while this was on its way.
            return
        kind = part.WhichOneof("message")
        if kind == "failure":
            failure = part.failure
            del self._living[part.handle]
            inbox.fail(
                make_error(failure.status, failure.reason, failure.message, dict(failure.limits))
            )
            return
        if inbox.put(part, kind):
            del self._living[part.handle]

    def _fail_all(self, make: Callable[[], PageframeError]) -> None:
        """End all that live, each with an error of its own, for each is raised elsewhere."""
        self.is_open = False
        living, self._living = self._living, {}
        for inbox in living.values():
            inbox.fail(make())


def _join(orders: list[pb.GenerateManyRequest]) -> pb.GenerateManyRequest:
    return pb.GenerateManyRequest(orders=pb.GenerateOrders(orders=orders))


def _closed() -> CancelledError:
    return CancelledError("CLIENT_CLOSED", "the client, or its event loop, was closed")


def _check_size(start: pb.GenerateStart) -> None:
    """Refuse here what the server would refuse: a message too large for gRPC ends all that live."""
    num_bytes = start.ByteSize()
    if num_bytes > LIMITS.request_bytes_max:
        raise InvalidRequestError(
            "REQUEST_TOO_LARGE",
            f"the request has {num_bytes} bytes; at most {LIMITS.request_bytes_max} are allowed",
            num_bytes=num_bytes,
            num_bytes_max=LIMITS.request_bytes_max,
        )


def _late() -> DeadlineError:
    # As gRPC says it of a call of its own.
    return DeadlineError("TRANSPORT", "Deadline Exceeded")


def _traceparent() -> str:
    """Where the caller stands, if the program traces with OpenTelemetry; else nothing can."""
    propagate = sys.modules.get("opentelemetry.propagate")
    if propagate is None:
        return ""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")
