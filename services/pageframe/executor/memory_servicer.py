"""KV memory's own gRPC face."""

from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from pageframe.core.errors import UnimplementedError
from pageframe.rpc.handlers import aborting
from pageframe.v1 import kv_memory_service_pb2 as pb
from pageframe.v1 import kv_memory_service_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


class KvMemoryServicer(kv_memory_service_pb2_grpc.KvMemoryServiceServicer):
    """Answers ``pageframe.v1.KvMemoryService`` with typed refusals.

    The contract is published so that clients can be written against it; this server does not
    offer any of its methods and says so with the reason KV_MEMORY_SERVICE_UNAVAILABLE.
    """

    async def Snapshot(  # noqa: N802 - the name is the contract's
        self, request: pb.KvMemoryServiceSnapshotRequest, context: _Context
    ) -> pb.KvMemoryServiceSnapshotResponse:
        """Refuse."""
        await _refuse(context, "Snapshot")

    async def Explain(  # noqa: N802 - the name is the contract's
        self, request: pb.ExplainRequest, context: _Context
    ) -> pb.ExplainResponse:
        """Refuse."""
        await _refuse(context, "Explain")

    async def Watch(  # noqa: N802 - the name is the contract's
        self, request: pb.WatchRequest, context: _Context
    ) -> AsyncIterator[pb.WatchResponse]:
        """Refuse."""
        await _refuse(context, "Watch")
        yield pb.WatchResponse()

    async def Retain(  # noqa: N802 - the name is the contract's
        self, request: pb.RetainRequest, context: _Context
    ) -> pb.RetainResponse:
        """Refuse."""
        await _refuse(context, "Retain")

    async def Release(  # noqa: N802 - the name is the contract's
        self, request: pb.ReleaseRequest, context: _Context
    ) -> pb.ReleaseResponse:
        """Refuse."""
        await _refuse(context, "Release")

    async def SetQuota(  # noqa: N802 - the name is the contract's
        self, request: pb.SetQuotaRequest, context: _Context
    ) -> pb.SetQuotaResponse:
        """Refuse."""
        await _refuse(context, "SetQuota")

    async def Resize(  # noqa: N802 - the name is the contract's
        self, request: pb.ResizeRequest, context: _Context
    ) -> pb.ResizeResponse:
        """Refuse."""
        await _refuse(context, "Resize")


async def _refuse(context: _Context, method: str) -> NoReturn:
    async with aborting(context):
        raise UnimplementedError(
            "KV_MEMORY_SERVICE_UNAVAILABLE",
            f"this server does not offer KvMemoryService.{method}",
            method=method,
        )
    raise AssertionError("aborting raises")
