"""The client for programs without an event loop."""

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

import grpc

from pageframe.client.attempts import Attempts
from pageframe.client.channel import DEFAULT_SERVER, open_gateway_channel
from pageframe.client.convert import (
    chat_to_proto,
    event_from_proto,
    model_from_proto,
    request_to_proto,
)
from pageframe.client.types import (
    Event,
    GenerationRequest,
    GenerationResult,
    Message,
    Model,
    collect,
)
from pageframe.core.errors import DeadlineError, PageframeError, UnavailableError
from pageframe.rpc.status import from_rpc_error
from pageframe.rpc.tls import ClientTls
from pageframe.v1 import gateway_service_pb2 as pb
from pageframe.v1 import gateway_service_pb2_grpc

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class PageframeClient:
    """Talks to a gateway; a context manager. Safe to share between threads.

    Args:
        server: ``HOST:PORT`` or ``unix:/path``.
        api_key: Sent as ``authorization: Bearer``, where the server asks for one.
        retry_for_s: How long to try again without progress while the server is unavailable.
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
        tls: ClientTls | None = None,
    ) -> None:
        self._retry_for_s = retry_for_s
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._channel = open_gateway_channel(server, tls)
        self._stub = gateway_service_pb2_grpc.GatewayServiceStub(self._channel)

    def generate(
        self, request: GenerationRequest, *, timeout_s: float | None = None
    ) -> Iterator[Event]:
        """Stream one generation: ``Started``, deltas, and ``Finished`` for each sample.

        A broken stream is resumed without a trace in the events, unless its outputs are ranked.
        Close the iterator to cancel.

        Raises:
            PageframeError: as the server says.
        """
        attempts = Attempts(request, retry_for_s=self._retry_for_s, now_s=time.monotonic)
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                for event in self._stream(attempts.request(), deadline_s):
                    if (news := attempts.accept(event)) is not None:
                        yield news
                if attempts.is_done:
                    return
                raise UnavailableError("STREAM_ENDED", "the server ended the stream too early")
            except PageframeError as error:
                if attempts.is_done:
                    return
                time.sleep(attempts.delay_after(error))

    def complete(
        self, request: GenerationRequest, *, timeout_s: float | None = None
    ) -> GenerationResult:
        """Run one generation to its end.

        Raises:
            PageframeError: as the server says.
        """
        return collect(list(self.generate(request, timeout_s=timeout_s)))

    def cancel(self, request_id: str) -> None:
        """End a request, perhaps of another client of the same tenant.

        Raises:
            NotFoundError: no such request lives at this gateway.
        """
        self._unary(self._stub.Cancel, pb.CancelRequest(request_id=request_id))

    def list_models(self) -> list[Model]:
        """What is served."""
        response = self._unary(self._stub.ListModels, pb.ListModelsRequest())
        return [model_from_proto(model) for model in response.models]

    def tokenize(self, prompt: str | Sequence[Message], *, model: str = "") -> list[int]:
        """Token ids of a text or a chat, as ``generate`` would make them."""
        request = pb.TokenizeRequest(model=model)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.chat.CopyFrom(chat_to_proto(prompt))
        return list(self._unary(self._stub.Tokenize, request).token_ids)

    def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", keep_special_tokens: bool = False
    ) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(
            model=model, token_ids=token_ids, keep_special_tokens=keep_special_tokens
        )
        return self._unary(self._stub.Detokenize, request).text

    def close(self) -> None:
        """Close the channel; running generations end."""
        self._channel.close()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the channel."""
        self.close()

    def _stream(self, request: GenerationRequest, deadline_s: float | None) -> Iterator[Event]:
        """One attempt."""
        call = self._stub.Generate(
            request_to_proto(request),
            timeout=remaining_s(deadline_s, time.monotonic()),
            metadata=self._metadata,
        )
        try:
            for message in call:
                yield event_from_proto(message)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    def _unary(
        self, method: "grpc.UnaryUnaryMultiCallable[_Request, _Response]", request: _Request
    ) -> _Response:
        try:
            return method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


def remaining_s(deadline_s: float | None, now_s: float) -> float | None:
    """Seconds until a deadline; None without one.

    Raises:
        DeadlineError: reason DEADLINE_PASSED.
    """
    if deadline_s is None:
        return None
    if deadline_s <= now_s:
        raise DeadlineError("DEADLINE_PASSED", "the time for this request is over")
    return deadline_s - now_s
