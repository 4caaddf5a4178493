"""The typed client of KV memory's own service, for programs with an event loop. It only looks."""

from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc

from pageframe.client.kv_memory import ACCOUNT_TIMEOUT_S, TIMEOUT_S_DEFAULT
from pageframe.core.replica import PoolAccount
from pageframe.rpc.channel import open_inner_channel
from pageframe.rpc.status import from_rpc_error
from pageframe.v1 import executor_service_pb2_grpc, kv_memory_service_pb2_grpc
from pageframe.v1 import kv_memory_service_pb2 as pb
from pageframe.v1.executor_service_pb2 import DescribeRequest
from pageframe.wire.kv_memory import (
    batch_from_proto,
    explanation_from_proto,
    snapshot_from_proto,
)
from pageframe.wire.memory_facts import BlockExplanation, MemorySnapshot, OperationBatch
from pageframe.wire.replica import pool_from_proto


class KvMemoryClients:
    """Clients of several callers over one channel, which opens with the first of them.

    Args:
        address: Where the executor listens, ``HOST:PORT`` or ``unix:/path``.
        open_channel: Makes the channel to an address.
    """

    def __init__(
        self, address: str, open_channel: Callable[[str], grpc.aio.Channel] = open_inner_channel
    ) -> None:
        self._address = address
        self._open_channel = open_channel
        self._channel: grpc.aio.Channel | None = None

    def client(self, authorization: str | None) -> "AsyncKvMemoryClient":
        """A client that sends this ``authorization``."""
        if self._channel is None:
            self._channel = self._open_channel(self._address)
        return AsyncKvMemoryClient(self._channel, authorization=authorization)

    async def close(self) -> None:
        """Close the channel; watches end."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()


class AsyncKvMemoryClient:
    """Looks at an executor's block pool; for one event loop.

    Args:
        channel: To the executor; closed by whoever made it.
        authorization: ``Bearer KEY`` of the one who looks; None where there are no keys.
        timeout_s: How long a call may take; it waits for the step that runs.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        authorization: str | None = None,
        timeout_s: float = TIMEOUT_S_DEFAULT,
    ) -> None:
        self._timeout_s = timeout_s
        self._metadata = () if authorization is None else (("authorization", authorization),)
        # The generated stub is typed for channels of both kinds at once.
        self._stub: Any = kv_memory_service_pb2_grpc.KvMemoryServiceStub(channel)
        self._inner: Any = executor_service_pb2_grpc.ExecutorServiceStub(channel)

    async def snapshot(self) -> MemorySnapshot:
        """The pool at one step boundary.

        Raises:
            PageframeError: as the server says; so for all methods.
        """
        request = pb.KvMemoryServiceSnapshotRequest()
        return snapshot_from_proto(await self._unary(self._stub.Snapshot, request))

    async def account(self) -> PoolAccount:
        """Blocks by state between two steps; nothing of them is copied."""
        timeout_s = min(self._timeout_s, ACCOUNT_TIMEOUT_S)
        answer = await self._unary(self._inner.Describe, DescribeRequest(), timeout_s)
        return pool_from_proto(answer.pool)

    async def explain(self, block_id: int) -> BlockExplanation:
        """Who holds a block, why, and since when.

        Raises:
            OutOfRangeError: reason BLOCK_UNKNOWN.
        """
        answer = await self._unary(self._stub.Explain, pb.ExplainRequest(block_id=block_id))
        return explanation_from_proto(block_id, answer)

    async def watch(
        self, first_operation: int, *, pool_incarnation: int = 0
    ) -> AsyncGenerator[OperationBatch, None]:
        """Operations from a number on, in batches; close the iterator to end the watch.

        Raises:
            PageframeError: how the server ended it: POOL_REPLACED, when the pool is not
                ``pool_incarnation``, WATCHERS_FULL, or UNAVAILABLE.
        """
        request = pb.WatchRequest(
            first_operation=first_operation, pool_incarnation=pool_incarnation
        )
        call = self._stub.Watch(request, metadata=self._metadata)
        try:
            async for message in call:
                yield batch_from_proto(message)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def _unary(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        timeout_s = timeout_s or self._timeout_s
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
