"""The gateway's gRPC face."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, TypeVar, cast

import grpc

from pageframe.core.clock import Clock
from pageframe.core.errors import InvalidRequestError, UnavailableError
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.gateway.convert import (
    PartFields,
    chat_from_proto,
    check_size,
    input_from_proto,
    model_to_proto,
    output_to_proto,
    part_of,
    parts_to_proto,
    seconds_of,
)
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.many import ManyStream, Start, TakeBack
from pageframe.gateway.request import GenerateInput
from pageframe.gateway.validation import check_stops
from pageframe.rpc.auth import Authenticator
from pageframe.rpc.handlers import aborting
from pageframe.telemetry.context import TraceContext, parse_traceparent
from pageframe.v1 import gateway_service_pb2 as pb
from pageframe.v1 import gateway_service_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]
_Message = TypeVar("_Message")

# A later deadline than this is as good as none; it keeps nanoseconds within 64 bits.
_DEADLINE_MAX_S = 366 * 24 * 3600


class Malformed:
    """Stands for a request whose bytes are no message of its type."""


class GatewayServicer(gateway_service_pb2_grpc.GatewayServiceServicer):
    """Serves ``pageframe.v1.GatewayService``.

    Handlers get a ``Malformed`` where the caller's bytes could not be parsed, invalid UTF-8
    included: so that answer, too, is a typed error.

    Args:
        service: Does the work.
        authenticator: Tells tenants.
        clock: Source of time.
    """

    def __init__(
        self, service: GenerationService, authenticator: Authenticator, clock: Clock
    ) -> None:
        self._service = service
        self._authenticator = authenticator
        self._clock = clock
        self._streams: set[ManyStream[PartFields]] = set()

    # Writes by itself, so that it is ended at once when the caller goes away: gRPC would leave an
    # asynchronous generator, which the generated base class expects, to the garbage collector.
    async def Generate(  # type: ignore[override]  # noqa: N802 - the name is the contract's
        self, request: pb.GenerateRequest | Malformed, context: _Context
    ) -> None:
        """Stream one generation; a caller that goes away cancels it."""
        async with aborting(context):
            # None without a deadline, whatever the type says.
            remaining_s = cast("float | None", context.time_remaining())
            generation = self._service.generate(
                self._input(_well_formed(request), remaining_s, context), _trace_context(context)
            )
            async with contextlib.aclosing(generation) as outputs:
                async for output in outputs:
                    said = output_to_proto(output)
                    if said is not None:
                        await context.write(said)

    async def GenerateMany(  # type: ignore[override]  # noqa: N802 - the name is the contract's
        self,
        request_iterator: AsyncIterator[pb.GenerateManyRequest | Malformed],
        context: _Context,
    ) -> None:
        """Carry many generations; a caller that goes away cancels all that live on its stream."""
        async with aborting(context):
            self._tenant(context)
            if self._service.is_draining:
                raise _draining()

            async def write(parts: list[PartFields]) -> None:
                for message in parts_to_proto(parts):
                    await context.write(message)

            stream = ManyStream(self._service, part_of)
            self._streams.add(stream)
            try:
                await context.write(pb.GenerateManyResponse())
                await stream.run(request_iterator, partial(self._orders, context), write)
            finally:
                self._streams.discard(stream)

    def end_streams(self) -> None:
        """End the streams of many generations, once the service has drained: none is needed."""
        for stream in self._streams:
            stream.end(_draining())

    async def Cancel(  # noqa: N802 - the name is the contract's
        self, request: pb.CancelRequest | Malformed, context: _Context
    ) -> pb.CancelResponse:
        """End a living request."""
        async with aborting(context):
            self._service.cancel(self._tenant(context), _well_formed(request).request_id)
            return pb.CancelResponse()
        raise AssertionError("aborting raises")

    async def ListModels(  # noqa: N802 - the name is the contract's
        self, request: pb.ListModelsRequest | Malformed, context: _Context
    ) -> pb.ListModelsResponse:
        """List what is served."""
        async with aborting(context):
            self._tenant(context)
            _well_formed(request)
            return pb.ListModelsResponse(models=map(model_to_proto, self._service.served))
        raise AssertionError("aborting raises")

    async def Tokenize(  # noqa: N802 - the name is the contract's
        self, request: pb.TokenizeRequest | Malformed, context: _Context
    ) -> pb.TokenizeResponse:
        """Turn text or a chat into token ids."""
        async with aborting(context):
            self._tenant(context)
            message = _well_formed(request)
            check_size(message)
            kind = message.WhichOneof("input")
            token_ids = await self._service.tokenize(
                message.model,
                message.text if kind == "text" else None,
                chat_from_proto(message.chat) if kind == "chat" else None,
            )
            return pb.TokenizeResponse(token_ids=token_ids)
        raise AssertionError("aborting raises")

    async def Detokenize(  # noqa: N802 - the name is the contract's
        self, request: pb.DetokenizeRequest | Malformed, context: _Context
    ) -> pb.DetokenizeResponse:
        """Turn token ids into text."""
        async with aborting(context):
            self._tenant(context)
            message = _well_formed(request)
            check_size(message)
            text = await self._service.detokenize(
                message.model,
                list(message.token_ids),
                skip_special_tokens=not message.keep_special_tokens,
            )
            return pb.DetokenizeResponse(text=text)
        raise AssertionError("aborting raises")

    def _orders(
        self, context: _Context, request: pb.GenerateManyRequest | Malformed
    ) -> Iterator[Start | TakeBack]:
        """What one message of a stream of many generations asks for.

        Raises:
            InvalidRequestError: MALFORMED_MESSAGE, UNEXPECTED_MESSAGE or HANDLE_MISSING.
        """
        message = _well_formed(request)
        match message.WhichOneof("message"):
            case "start":
                yield self._start(context, message.start)
            case "cancel":
                yield TakeBack(message.cancel.handle)
            case "orders":
                for order in message.orders.orders:
                    yield from self._orders(context, order)
            case _:
                raise InvalidRequestError(
                    "UNEXPECTED_MESSAGE", "the message is neither a start nor a cancel"
                )

    def _start(self, context: _Context, start: pb.GenerateStart) -> Start:
        if not start.handle:
            raise InvalidRequestError("HANDLE_MISSING", "a start needs a handle that is not 0")
        remaining_s = seconds_of(start.timeout) if start.HasField("timeout") else None
        return Start(
            start.handle,
            partial(self._input, start.request, remaining_s, context),
            parse_traceparent(start.traceparent),
        )

    def _input(
        self, message: pb.GenerateRequest, remaining_s: float | None, context: _Context
    ) -> GenerateInput:
        """What one generation asks for, of whatever door.

        Raises:
            PageframeError: refused.
        """
        check_stops(message.stop)
        check_size(message)
        return input_from_proto(
            message, tenant=self._tenant(context), deadline_ns=self._deadline_ns(remaining_s)
        )

    def _tenant(self, context: _Context) -> str:
        return self._authenticator.tenant(_metadata(context, "authorization"))

    def _deadline_ns(self, remaining_s: float | None) -> int:
        """When a caller's time is over; 0 for never."""
        if remaining_s is None or remaining_s > _DEADLINE_MAX_S:
            return 0
        return max(1, self._clock.now_ns() + int(remaining_s * NANOSECONDS_PER_SECOND))


def _trace_context(context: _Context) -> TraceContext | None:
    header = _metadata(context, "traceparent")
    return None if header is None else parse_traceparent(header)


def _metadata(context: _Context, name: str) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else value.decode("utf-8", "replace")
    return None


def _draining() -> UnavailableError:
    return UnavailableError("DRAINING", "this gateway is shutting down; try another one")


def _well_formed(message: _Message | Malformed) -> _Message:
    if isinstance(message, Malformed):
        raise InvalidRequestError(
            "MALFORMED_MESSAGE",
            "the request is no valid protobuf message of its type; is a text not UTF-8?",
        )
    return message
