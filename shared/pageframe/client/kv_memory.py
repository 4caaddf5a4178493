"""The typed client of KV memory's own service, for programs without an event loop.

with KvMemoryClient("unix:/path/to/executor.sock") as memory:
    kept = memory.retain(token_ids, time_to_live_s=600)
    print(memory.snapshot().account)
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc

from pageframe.client.channel import open_gateway_channel
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.rpc.status import from_rpc_error
from pageframe.rpc.tls import ClientTls
from pageframe.v1 import executor_service_pb2_grpc, kv_memory_service_pb2_grpc
from pageframe.v1 import kv_memory_service_pb2 as pb
from pageframe.v1.executor_service_pb2 import DescribeRequest
from pageframe.wire.kv_memory import (
    batch_from_proto,
    duration_from_ns,
    explanation_from_proto,
    resize_outcome_from_proto,
    retention_facts_from_proto,
    snapshot_from_proto,
)
from pageframe.wire.memory_facts import (
    BlockExplanation,
    MemorySnapshot,
    OperationBatch,
    ResizeOutcome,
    RetentionFacts,
)
from pageframe.wire.replica import pool_from_proto, quota_to_proto

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

TIMEOUT_S_DEFAULT: Final = 30.0
"""How long a call may take; it waits for the step that runs."""

ACCOUNT_TIMEOUT_S: Final = 5.0
"""How long counting may take; whoever takes longer is said to be away, and asked again."""


class OperationWatch:
    """Operations on blocks as they happen, in batches; an iterator and a context manager.

    It ends only by an error or by ``close``, which may be called on any thread.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[OperationBatch]:
        """Batches until the watch is closed.

        Raises:
            PageframeError: how the server ended it; not raised after ``close``.
        """
        try:
            for message in self._call:
                yield batch_from_proto(message)
        except grpc.RpcError as error:
            if not self._call.cancelled():
                raise from_rpc_error(error) from error

    def close(self) -> None:
        """End the watch."""
        self._call.cancel()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the watch."""
        self.close()


class KvMemoryClient:
    """Talks to an executor; a context manager. Safe to share between threads.

    Args:
        server: ``unix:/path`` or ``HOST:PORT`` of the executor.
        api_key: Sent as ``authorization: Bearer``, where the server asks for one.
        timeout_s: How long a call may take.
        tls: Whom to believe over TCP, and what to show; None for plain text.

    Raises:
        InvalidRequestError: as ``ClientTls.credentials``.
    """

    def __init__(
        self,
        server: str,
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S_DEFAULT,
        tls: ClientTls | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._channel = open_gateway_channel(server, tls)
        self._stub = kv_memory_service_pb2_grpc.KvMemoryServiceStub(self._channel)
        self._inner = executor_service_pb2_grpc.ExecutorServiceStub(self._channel)

    def snapshot(self) -> MemorySnapshot:
        """The pool at one step boundary.

        Raises:
            PageframeError: as the server says; so for all methods.
        """
        request = pb.KvMemoryServiceSnapshotRequest()
        return snapshot_from_proto(self._unary(self._stub.Snapshot, request))

    def account(self) -> PoolAccount:
        """Blocks by state between two steps; nothing of them is copied."""
        timeout_s = min(self._timeout_s, ACCOUNT_TIMEOUT_S)
        answer = self._unary(self._inner.Describe, DescribeRequest(), timeout_s)
        return pool_from_proto(answer.pool)

    def explain(self, block_id: int) -> BlockExplanation:
        """Who holds a block, why, and since when.

        Raises:
            OutOfRangeError: reason BLOCK_UNKNOWN.
        """
        request = pb.ExplainRequest(block_id=block_id)
        return explanation_from_proto(block_id, self._unary(self._stub.Explain, request))

    def watch(self, first_operation: int = 0, *, pool_incarnation: int = 0) -> OperationWatch:
        """Operations from a number on; 0 for those that happen after this call has returned.

        A refusal is raised by the iteration: POOL_REPLACED, when the pool is not
        ``pool_incarnation``, or WATCHERS_FULL.
        """
        request = pb.WatchRequest(
            first_operation=first_operation, pool_incarnation=pool_incarnation
        )
        call = self._stub.Watch(request, metadata=self._metadata)
        # Comes once the server watches for us; empty, when it refuses.
        call.initial_metadata()
        return OperationWatch(call)

    def retain(
        self, token_ids: Sequence[int], *, time_to_live_s: float, request_id: str = ""
    ) -> RetentionFacts:
        """Keep the blocks of a prefix for a while.

        Args:
            token_ids: The prefix.
            time_to_live_s: How long from now.
            request_id: Makes a repeated call harmless.

        Raises:
            ResourceExhaustedError: reason RETENTIONS_FULL or QUOTA_EXCEEDED.
        """
        request = pb.RetainRequest(
            request_id=request_id,
            token_ids=token_ids,
            time_to_live=duration_from_ns(round(time_to_live_s * NANOSECONDS_PER_SECOND)),
        )
        return retention_facts_from_proto(self._unary(self._stub.Retain, request))

    def release(self, handle: str) -> None:
        """Give a handle back.

        Raises:
            NotFoundError: reason HANDLE_UNKNOWN.
        """
        self._unary(self._stub.Release, pb.ReleaseRequest(handle=handle))

    def set_quota(self, quota: TenantQuota) -> int:
        """Bound a tenant; returns the blocks that it holds now."""
        request = pb.SetQuotaRequest(quota=quota_to_proto(quota))
        return self._unary(self._stub.SetQuota, request).num_blocks_held

    def resize(self, num_blocks: int) -> ResizeOutcome:
        """Change the number of blocks of the pool."""
        request = pb.ResizeRequest(num_blocks=num_blocks)
        return resize_outcome_from_proto(self._unary(self._stub.Resize, request))

    def close(self) -> None:
        """Close the channel; watches end."""
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

    def _unary(
        self,
        method: "grpc.UnaryUnaryMultiCallable[_Request, _Response]",
        request: _Request,
        timeout_s: float | None = None,
    ) -> _Response:
        timeout_s = timeout_s or self._timeout_s
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
