"""The client for programs with an event loop."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Self, TypeVar

import grpc

from pageframe.client.attempts import Attempts
from pageframe.client.channel import DEFAULT_SERVER, open_aio_gateway_channel
from pageframe.client.convert import (
    chat_to_proto,
    event_from_proto,
    model_from_proto,
    request_to_proto,
)
from pageframe.client.many import ManyGenerations
from pageframe.client.sync import remaining_s
from pageframe.client.types import (
    Event,
    GenerationRequest,
    GenerationResult,
    Message,
    Model,
    collect,
)
from pageframe.core.errors import PageframeError, UnavailableError
from pageframe.rpc.status import from_rpc_error
from pageframe.rpc.tls import ClientTls
from pageframe.v1 import gateway_service_pb2 as pb
from pageframe.v1 import gateway_service_pb2_grpc

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncPageframeClient:
    """Talks to a gateway; an asynchronous context manager, for one event loop.

    Generations that run at the same time share a stream, so that many of them cost the processor
    little more than one; a server that has no such method is asked for each by itself. Whoever
    takes events slowly holds up no other: they wait here, at most as many as its ``max_tokens``.

    Args:
        server: ``HOST:PORT`` or ``unix:/path``.
        api_key: Sent as ``authorization: Bearer``, where the server asks for one.
        retry_for_s: How long to try again without progress while the server is unavailable.
        channel: Used, and closed, instead of a channel to ``server``: in tests.
        tls: Whom to believe over TCP, and what to show; None for plain text.

    Raises:
        InvalidRequestError: as ``ClientTls.credentials``.
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        api_key: str | None = None,
        retry_for_s: float = 10.0,
        channel: grpc.aio.Channel | None = None,
        tls: ClientTls | None = None,
    ) -> None:
        self._retry_for_s = retry_for_s
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._channel = channel or open_aio_gateway_channel(server, tls)
        self._stub = gateway_service_pb2_grpc.GatewayServiceStub(self._channel)
        self._many = ManyGenerations(self._stub, self._metadata)

    async def generate(
        self, request: GenerationRequest, *, timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Stream one generation: ``Started``, deltas, and ``Finished`` for each sample.

        Tokens that have come while the caller was busy are one delta. A broken stream is resumed
        without a trace in the events, unless its outputs are ranked.
        Close the iterator (``contextlib.aclosing``) to cancel.

        Raises:
            PageframeError: as the server says.
        """
        async with contextlib.aclosing(self._batches(request, timeout_s)) as batches:
            async for events in batches:
                for event in events:
                    yield event

    async def _batches(
        self, request: GenerationRequest, timeout_s: float | None, *, at_end: bool = False
    ) -> AsyncGenerator[list[Event], None]:
        """Events of ``generate`` that are there together.

        With ``at_end`` nothing is looked at before an attempt is over.
        """
        now_s = asyncio.get_running_loop().time
        attempts = Attempts(request, retry_for_s=self._retry_for_s, now_s=now_s)
        deadline_s = None if timeout_s is None else now_s() + timeout_s
        while True:
            is_many = self._many.is_offered
            asked = attempts.request()
            try:
                stream = (
                    self._many.generate(asked, deadline_s, at_end=at_end)
                    if is_many
                    else self._generate_alone(asked, deadline_s)
                )
                async with contextlib.aclosing(stream) as batches:
                    async for events in batches:
                        news = [attempts.accept(event) for event in events]
                        yield [event for event in news if event is not None]
                if attempts.is_done:
                    return
                raise UnavailableError("STREAM_ENDED", "the server ended the stream too early")
            except PageframeError as error:
                if attempts.is_done:
                    return
                if is_many and not self._many.is_offered:
                    continue
                await asyncio.sleep(attempts.delay_after(error))

    async def complete(
        self, request: GenerationRequest, *, timeout_s: float | None = None
    ) -> GenerationResult:
        """Run one generation to its end.

        Raises:
            PageframeError: as the server says.
        """
        found: list[Event] = []
        async with contextlib.aclosing(self._batches(request, timeout_s, at_end=True)) as batches:
            async for events in batches:
                found += events
        return collect(found)

    async def cancel(self, request_id: str) -> None:
        """End a request, perhaps of another client of the same tenant.

        Raises:
            NotFoundError: no such request lives at this gateway.
        """
        await self._unary(self._stub.Cancel, pb.CancelRequest(request_id=request_id))

    async def list_models(self) -> list[Model]:
        """What is served."""
        response = await self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [model_from_proto(model) for model in response.models]

    async def tokenize(self, prompt: str | Sequence[Message], *, model: str = "") -> list[int]:
        """Token ids of a text or a chat, as ``generate`` would make them."""
        request = pb.TokenizeRequest(model=model)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.chat.CopyFrom(chat_to_proto(prompt))
        return list((await self._unary(self._stub.Tokenize, request)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", keep_special_tokens: bool = False
    ) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(
            model=model, token_ids=token_ids, keep_special_tokens=keep_special_tokens
        )
        return (await self._unary(self._stub.Detokenize, request)).text

    async def close(self) -> None:
        """Close the channel; running generations end."""
        await self._many.close()
        await self._channel.close()

    async def __aenter__(self) -> Self:
        """Begin."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the channel."""
        await self.close()

    async def _generate_alone(
        self, request: GenerationRequest, deadline_s: float | None
    ) -> AsyncGenerator[list[Event], None]:
        """One attempt on a stream of its own, as ``ManyGenerations.generate``."""
        call = self._stub.Generate(
            request_to_proto(request),
            timeout=remaining_s(deadline_s, asyncio.get_running_loop().time()),
            metadata=self._metadata,
        )
        try:
            async for message in call:
                yield [event_from_proto(message)]
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def _unary(
        self, method: "grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]", request: _Request
    ) -> _Response:
        try:
            return await method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
