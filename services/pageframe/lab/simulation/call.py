"""One RPC of the simulated network, with the faces that ``grpc.aio`` shows to both ends.

    client code ─▶ ClientCall ══ requests ══▶ ServerContext ─▶ servicer
                              ◀═ responses ══

Messages cross as bytes, through the serialisers that the generated stubs name. The ends behave as
those of gRPC do where our code depends on it: a read behind the end raises its status, a write on
an ended call is an ``InvalidStateError``, and a caller that goes away cancels its handler.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import grpc

from pageframe.lab.simulation.pipe import Pipe, PipeBrokenError
from pageframe.lab.simulation.virtual_time import Process, wait_until

Metadata = Sequence[tuple[str, str | bytes]]


class Status(NamedTuple):
    """How a call ended."""

    code: grpc.StatusCode
    details: str = ""
    trailers: Metadata = ()


class Wire(Protocol):
    """What a call needs of its network."""

    loop: asyncio.AbstractEventLoop

    def draw_delay(self) -> float:
        """Seconds until the next message arrives."""
        ...

    def draw_window(self) -> int:
        """Messages of a stream that may be under way."""
        ...

    def flip(self) -> bool:
        """One of two orders in which things may happen."""
        ...

    def note(self, line: str, data: bytes = b"") -> None:
        """Write down what arrived."""
        ...

    def fail(self, line: str) -> None:
        """Report what must not happen."""
        ...


OK = Status(grpc.StatusCode.OK)
_CANCELLED = Status(grpc.StatusCode.CANCELLED, "the caller cancelled the call")
_LATE = Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


class ClientCall:
    """The caller's end, and what both ends share.

    Attributes:
        client: The process that calls.
        server: The process that answers; None until it is found.
    """

    def __init__(
        self,
        wire: Wire,
        client: Process,
        method: str,
        parse_response: Callable[[bytes], object],
        *,
        timeout_s: float | None,
        metadata: Metadata,
    ) -> None:
        self.client = client
        self.server: Process | None = None
        self.method = method
        self._wire = wire
        self._parse_response = parse_response
        self._parse_request: Callable[[bytes], object] = bytes
        self._metadata = metadata
        loop = wire.loop
        self._end_s = None if timeout_s is None else loop.time() + timeout_s
        window = wire.draw_window()
        self._requests = Pipe(loop, wire.draw_delay, window, _do_nothing)
        self._responses = Pipe(loop, wire.draw_delay, window, self._take_status)
        self._sent_status: Status | None = None
        self._status: Status | None = None
        self._ended: asyncio.Future[None] = loop.create_future()
        self._found: asyncio.Future[None] = loop.create_future()
        self._handler: asyncio.Task[None] | None = None
        if self._end_s is not None:
            loop.call_at(self._end_s, self._expire)

    # The client's face.

    def done(self) -> bool:
        """Whether it has ended, as the caller knows."""
        return self._status is not None

    @property
    def is_over(self) -> bool:
        """Whether both ends are done with it."""
        return self.done() and (self._handler is None or self._handler.done())

    async def write(self, request: Any) -> None:
        """Send a message.

        Raises:
            InvalidStateError: the call has ended.
            AioRpcError: it ended while the message waited.
        """
        if self._status is not None:
            raise asyncio.InvalidStateError("the call has ended")
        if self.server is None:
            await asyncio.wait((self._found, self._ended), return_when=asyncio.FIRST_COMPLETED)
        self._parse_request = type(request).FromString
        try:
            await self._requests.send(request.SerializeToString(deterministic=True))
        except PipeBrokenError:
            raise await self._error() from None

    async def done_writing(self) -> None:
        """Say that no more messages come."""
        self._requests.finish()

    async def read(self) -> object:
        """The next message; ``grpc.aio.EOF`` when the call has ended well.

        Raises:
            AioRpcError: it ended otherwise.
        """
        data = await self._responses.receive()
        if data is not None:
            self._wire.note(f"{self.client.name} <- {self.method}", data)
            return self._parse_response(data)
        if await self.code() is grpc.StatusCode.OK:
            return grpc.aio.EOF
        raise await self._error()

    async def __aiter__(self) -> AsyncIterator[object]:
        """All messages."""
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    def cancel(self) -> bool:
        """Go away."""
        if self._status is not None:
            return False
        self._end_here(_CANCELLED)
        self._wire.loop.call_later(self._wire.draw_delay(), self._leave_server)
        return True

    async def code(self) -> grpc.StatusCode:
        """How it ended."""
        if self._status is None:
            await asyncio.shield(self._ended)
        assert self._status is not None, "it has ended"
        return self._status.code

    async def details(self) -> str:
        """What the server says of it."""
        await self.code()
        assert self._status is not None, "it has ended"
        return self._status.details

    async def initial_metadata(self) -> Metadata:
        """Nothing."""
        return ()

    async def trailing_metadata(self) -> Metadata:
        """What came with the end."""
        await self.code()
        assert self._status is not None, "it has ended"
        return self._status.trailers

    # The network's face.

    def serve(self, server: Process, servicer: object, *, streams_requests: bool) -> None:
        """Start the handler in the server's process."""
        self.server = server
        handle = getattr(servicer, self.method.rpartition("/")[2])
        self._found.set_result(None)
        self._handler = server.spawn(self._handle(handle, streams_requests=streams_requests))

    def refuse(self, status: Status) -> None:
        """Nobody is there."""
        self._end_here(status)

    def cut(self, status: Status, *, keeps_in_flight: bool) -> None:
        """The connection is gone, for both ends."""
        if not keeps_in_flight:
            self._sent_status = status
        self._sent_status = self._sent_status or status
        self._responses.cut(keeps_in_flight=keeps_in_flight)
        self._leave_server()

    # The server's end.

    async def _handle(self, handle: Callable[[Any, Any], Any], *, streams_requests: bool) -> None:
        context = ServerContext(self)
        status, answer = _CANCELLED, cast("Any", None)
        try:
            request: Any = self._all_requests()
            if not streams_requests:
                request = await anext(request, None)
                if request is None:
                    return
            answer = handle(request, context)
            if inspect.isasyncgen(answer):
                async for response in answer:
                    await context.write(response)
            else:
                response = await answer
                if response is not None:
                    await context.write(response)
            status = OK
        except grpc.aio.AbortError:
            status = context.status
        except PipeBrokenError:
            pass
        except Exception as error:
            self._wire.fail(f"the handler of {self.method} raised {error!r}")
            status = Status(grpc.StatusCode.UNKNOWN, "the handler failed")
        finally:
            # As with gRPC, a generator that is left in its midst is finalised when nobody holds it.
            answer = None
            self._sent_status = self._sent_status or status
            self._responses.finish()
            self._requests.cut(keeps_in_flight=False)

    async def _all_requests(self) -> AsyncIterator[object]:
        while (data := await self._requests.receive()) is not None:
            assert self.server is not None, "it was found"
            self._wire.note(f"{self.server.name} <- {self.method}", data)
            yield self._parse_request(data)

    async def send_response(self, response: Any) -> None:
        """Send a message to the caller.

        Raises:
            PipeBrokenError: the caller is gone.
        """
        await self._responses.send(response.SerializeToString(deterministic=True))

    def seconds_left(self) -> float | None:
        """Until the caller's deadline; None without one."""
        return None if self._end_s is None else max(0.0, self._end_s - self._wire.loop.time())

    @property
    def metadata(self) -> Metadata:
        """What the caller sent with it."""
        return self._metadata

    # How it ends.

    def _leave_server(self) -> None:
        """The server notices that its caller is gone; in one of two orders."""
        if self._handler is None or self._handler.done():
            return
        if self._wire.flip():
            self._handler.cancel()
            self._requests.cut(keeps_in_flight=False)
        else:
            self._requests.cut(keeps_in_flight=False)
            self._wire.loop.call_later(self._wire.draw_delay(), self._handler.cancel)

    def _expire(self) -> None:
        if self._status is None:
            self._end_here(_LATE)
            self._wire.loop.call_later(self._wire.draw_delay(), self._leave_server)

    def _end_here(self, status: Status) -> None:
        self._sent_status = self._sent_status or status
        self._status = status
        self._responses.cut(keeps_in_flight=False)
        self._requests.finish()
        self._tell_ended()

    def _take_status(self) -> None:
        if self._status is None:
            self._status = self._sent_status or _CANCELLED
        self._tell_ended()

    def _tell_ended(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    async def _error(self) -> grpc.aio.AioRpcError:
        code = await self.code()
        assert self._status is not None, "it has ended"
        return grpc.aio.AioRpcError(
            code,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(*self._status.trailers),
            details=self._status.details,
        )


class ServerContext:
    """What a servicer sees of a call; the part of ``grpc.aio.ServicerContext`` that we use."""

    def __init__(self, call: ClientCall) -> None:
        self._call = call
        self.status = Status(grpc.StatusCode.UNKNOWN)

    async def write(self, response: Any) -> None:
        """Send a message."""
        await self._call.send_response(response)

    async def abort_with_status(self, status: Any) -> None:
        """End the call with a status.

        Raises:
            AbortError: always.
        """
        self.status = Status(status.code, status.details, tuple(status.trailing_metadata or ()))
        raise grpc.aio.AbortError

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline."""
        return self._call.seconds_left()

    def invocation_metadata(self) -> Metadata:
        """What the caller sent."""
        return self._call.metadata


async def pause(seconds: float) -> None:
    """Wait in virtual time."""
    await wait_until(asyncio.get_running_loop().time() + seconds)


def _do_nothing() -> None:
    """The server learns of the end of its requests when it reads them."""
