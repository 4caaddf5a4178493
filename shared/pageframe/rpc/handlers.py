"""What every RPC handler does around its work: turn typed errors into statuses."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from pageframe.core.errors import InternalError, PageframeError
from pageframe.rpc.status import to_rich_status

_log = structlog.get_logger(__name__)


@contextlib.asynccontextmanager
async def aborting(context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncIterator[None]:
    """Abort the call with a rich status when the block raises a ``PageframeError``.

    Any other exception is our bug: it is logged with its trace and reaches the caller as INTERNAL
    without its text, which may hold what is nobody else's business.
    """
    try:
        yield
    except PageframeError as error:
        await _abort(context, error)
    except (grpc.aio.AbortError, grpc.aio.BaseError):
        raise
    except Exception:
        _log.exception("handler_failed")
        await _abort(
            context, InternalError("INTERNAL", "the server failed; its log has the details")
        )


async def _abort(context: "grpc.aio.ServicerContext[Any, Any]", error: PageframeError) -> None:
    """End the call with ``error``; a caller that has just gone away does not hear it.

    A refusal for want of time and the end of that time come close together.
    """
    try:
        await context.abort_with_status(to_rich_status(error))
    except grpc.aio.InternalError as gone:
        raise asyncio.CancelledError from gone
