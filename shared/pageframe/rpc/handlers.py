"""What every RPC handler does around its work: turn typed errors into statuses."""

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
        await context.abort_with_status(to_rich_status(error))
    except (grpc.aio.AbortError, grpc.aio.BaseError):
        raise
    except Exception:
        _log.exception("handler_failed")
        internal = InternalError("INTERNAL", "the server failed; its log has the details")
        await context.abort_with_status(to_rich_status(internal))
