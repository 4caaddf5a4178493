"""Errors as gRPC statuses: one table both ways, with ``ErrorInfo`` details (AIP-193)."""

import math
from collections.abc import Iterable
from typing import Any, Final

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from pageframe.core import errors
from pageframe.core.errors import ERROR_DOMAIN, PageframeError
from pageframe.rpc.tls import is_trust_refused

ERROR_CLASSES: Final[dict[str, type[PageframeError]]] = {
    error.status: error
    for error in (
        errors.InvalidRequestError,
        errors.OutOfRangeError,
        errors.NotFoundError,
        errors.AlreadyExistsError,
        errors.UnauthenticatedError,
        errors.PermissionDeniedError,
        errors.PreconditionError,
        errors.ResourceExhaustedError,
        errors.DeadlineError,
        errors.CancelledError,
        errors.AbortedError,
        errors.UnavailableError,
        errors.UnimplementedError,
        errors.InternalError,
    )
}
"""Exception class of each canonical status that Pageframe raises."""


def to_rich_status(error: PageframeError) -> grpc.Status:
    """The status to abort a call with: canonical code, message, and ``ErrorInfo`` as detail.

    Where the error says ``retry_after_s`` there is a ``RetryInfo`` as well.
    """
    message = status_pb2.Status(code=code_pb2.Code.Value(error.status), message=error.message)
    message.details.add().Pack(
        error_details_pb2.ErrorInfo(
            reason=error.reason, domain=ERROR_DOMAIN, metadata=dict(error.limits)
        )
    )
    retry_after_s = error.limits.get("retry_after_s")
    if retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(math.ceil(float(retry_after_s) * 1000))
        message.details.add().Pack(retry)
    status: grpc.Status = rpc_status.to_status(message)
    return status


def from_rpc_error(error: grpc.RpcError) -> PageframeError:
    """The typed error behind a failed call; reason TRANSPORT when the peer sent no details.

    Codes outside the table (UNKNOWN, DATA_LOSS) become ``InternalError``. A server whose
    certificate is not that of whom it should be is an ``UnauthenticatedError``, reason
    TLS_PEER_NOT_TRUSTED.
    """
    code = error.code()
    details = error.details() or code.name
    if is_trust_refused(details):
        # It would be refused again: nothing to try later, unlike what else keeps a channel closed.
        return errors.UnauthenticatedError(
            "TLS_PEER_NOT_TRUSTED", f"the server is not known by the CA that was given: {details}"
        )
    reason, limits = _error_info(error)
    return make_error(code.name, reason, details, limits)


async def stream_error(call: "grpc.aio.StreamStreamCall[Any, Any]") -> PageframeError:
    """How an ended stream ended; one that ended well is UNAVAILABLE, reason STREAM_ENDED."""
    error = grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        details=await call.details(),
    )
    if error.code() is grpc.StatusCode.OK:
        return errors.UnavailableError("STREAM_ENDED", "the other side ended the stream")
    return from_rpc_error(error)


def make_error(status: str, reason: str, message: str, limits: dict[str, str]) -> PageframeError:
    """An error from its parts, as they stand in a completion."""
    error = ERROR_CLASSES.get(status, errors.InternalError)(reason, message)
    error.limits = limits
    return error


def _error_info(error: grpc.RpcError) -> tuple[str, dict[str, str]]:
    try:
        status = rpc_status.from_call(error)
    except (ValueError, AttributeError):
        status = None
    if status is None:
        # An aio error is not a call; its trailing metadata carries the same message.
        status = _status_from_trailers(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason, dict(info.metadata)
    return "TRANSPORT", {}


def _status_from_trailers(error: grpc.RpcError) -> status_pb2.Status | None:
    trailers: Iterable[tuple[str, str | bytes]] = ()
    if isinstance(error, grpc.aio.AioRpcError):
        trailers = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return None
