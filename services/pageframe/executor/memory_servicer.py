"""KV memory's own gRPC face: for operators, for tests, and for backends that keep prefixes.

Everything that looks at memory or changes it runs on the step thread, between two steps. What the
caller may not see is taken out here; what it may not do is refused here. Whether memory can do it
is for memory to say.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

import grpc

from pageframe.core.clock import Clock
from pageframe.core.errors import (
    CancelledError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from pageframe.core.limits import LIMITS
from pageframe.core.replica import ReplicaFacts, TenantQuota
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.executor.handles import Handles, check_prefix, check_request_id, check_tenant
from pageframe.executor.memory_snapshot import (
    BlockExplanation,
    MemorySnapshot,
    ResizeOutcome,
    RetentionFacts,
    batch_told_to,
    explanation_seen_by,
    snapshot_seen_by,
)
from pageframe.executor.operation_log import OperationLog
from pageframe.executor.step_thread import StepThread
from pageframe.executor.watchers import Watchers
from pageframe.rpc.auth import Authenticator, Caller, authorization_of
from pageframe.rpc.handlers import aborting
from pageframe.v1 import kv_memory_service_pb2 as pb
from pageframe.v1 import kv_memory_service_pb2_grpc
from pageframe.wire.kv_memory import (
    batch_to_proto,
    duration_to_ns,
    explanation_to_proto,
    resize_outcome_to_proto,
    retention_facts_to_proto,
    snapshot_to_proto,
)
from pageframe.wire.replica import quota_from_proto

_Context = grpc.aio.ServicerContext[Any, Any]
_Result = TypeVar("_Result")

# A later deadline than this is as good as none; it keeps nanoseconds within 64 bits.
_DEADLINE_MAX_S = 366 * 24 * 3600


class MemoryDesk(Protocol):
    """What this service asks of KV memory; all of it is called on the step thread."""

    def snapshot(self) -> MemorySnapshot:
        """The pool as it stands; arrays are copies. Without operation and incarnation."""
        ...

    def explain(self, block_id: int) -> BlockExplanation:
        """Who holds a block.

        Raises:
            OutOfRangeError: reason BLOCK_UNKNOWN.
        """
        ...

    def retain(
        self,
        *,
        tenant: str,
        cache_salt: bytes,
        name: str,
        token_ids: Sequence[int],
        ttl_ns: int,
        now_ns: int,
    ) -> RetentionFacts:
        """Keep the full blocks of a prefix under a name, or renew that.

        Raises:
            PageframeError: the time to live is out of range, or there is no room.
        """
        ...

    def release(self, *, tenant: str, name: str) -> None:
        """Let go of a handle.

        Raises:
            NotFoundError: reason HANDLE_UNKNOWN; also for a handle of another tenant.
        """
        ...

    def set_quota(self, quota: TenantQuota) -> int:
        """Bound a tenant; returns the blocks that it holds now.

        Raises:
            PageframeError: the bounds make no sense, or do not fit into the pool.
        """
        ...

    def resize(self, num_blocks: int) -> ResizeOutcome:
        """Change the number of blocks.

        Raises:
            PageframeError: the pool cannot have that size now; then nothing was changed.
        """
        ...


class KvMemoryServicer(kv_memory_service_pb2_grpc.KvMemoryServiceServicer):
    """Serves ``pageframe.v1.KvMemoryService`` over one step thread. Made on the event loop.

    Args:
        steps: The thread that owns KV memory.
        log: Operations on blocks. ``log.flush`` has to be called after every command of ``steps``.
        authenticator: Tells callers and their salts; as the gateway's.
        clock: Source of time.
        pool_incarnation: Names the pool within which operations are counted.
    """

    def __init__(
        self,
        steps: StepThread,
        log: OperationLog,
        authenticator: Authenticator,
        clock: Clock,
        *,
        pool_incarnation: int,
    ) -> None:
        self._steps = steps
        self._log = log
        self._authenticator = authenticator
        self._clock = clock
        self._pool_incarnation = pool_incarnation
        self._watchers = Watchers(log, steps, asyncio.get_running_loop())
        self._handles = Handles()
        self._opened: tuple[MemoryDesk, ReplicaFacts] | None = None

    def open(self, desk: MemoryDesk, facts: ReplicaFacts) -> None:
        """Serve from now on; calls before this are refused with UNAVAILABLE."""
        self._opened = desk, facts

    async def drain(self) -> None:
        """End all watches, which never end by themselves."""
        self._watchers.close()

    async def Snapshot(  # noqa: N802 - the name is the contract's
        self, request: pb.KvMemoryServiceSnapshotRequest, context: _Context
    ) -> pb.KvMemoryServiceSnapshotResponse:
        """Show every block and every block table."""
        async with aborting(context):
            caller, desk = self._caller(context), self._desk
            snapshot = await self._call(context, lambda: self._complete(desk.snapshot()))
            if not caller.is_operator:
                snapshot = snapshot_seen_by(caller.tenant, snapshot)
            message = snapshot_to_proto(snapshot)
            num_bytes = message.ByteSize()
            if num_bytes > LIMITS.message_bytes_max:
                raise ResourceExhaustedError(
                    "SNAPSHOT_TOO_LARGE",
                    f"the snapshot takes {num_bytes} bytes; a message may have "
                    f"{LIMITS.message_bytes_max}",
                    num_bytes=num_bytes,
                    num_bytes_max=LIMITS.message_bytes_max,
                )
            return message
        raise AssertionError("aborting raises")

    async def Explain(  # noqa: N802 - the name is the contract's
        self, request: pb.ExplainRequest, context: _Context
    ) -> pb.ExplainResponse:
        """Tell who holds a block, why, and since when."""
        async with aborting(context):
            caller, desk = self._caller(context), self._desk
            explanation = await self._call(
                context, lambda: self._with_last_operation(desk.explain(request.block_id))
            )
            if not caller.is_operator:
                explanation = explanation_seen_by(caller.tenant, explanation, self._tenant_of)
            return explanation_to_proto(explanation)
        raise AssertionError("aborting raises")

    # Writes by itself, so that it is ended at once when the caller goes away: gRPC would leave an
    # asynchronous generator, which the generated base class expects, to the garbage collector.
    async def Watch(  # type: ignore[override]  # noqa: N802 - the name is the contract's
        self, request: pb.WatchRequest, context: _Context
    ) -> None:
        """Stream operations; ends when the caller goes away, or with the executor."""
        async with aborting(context):
            caller, _ = self._caller(context), self._desk
            if request.pool_incarnation not in (0, self._pool_incarnation):
                raise PreconditionError(
                    "POOL_REPLACED",
                    f"operations of pool {request.pool_incarnation} were asked for, this is pool "
                    f"{self._pool_incarnation}; its operations count from 1",
                    pool_incarnation=self._pool_incarnation,
                )
            with self._watchers.joined():
                num_before = await self._call(context, self._publish)
                first_number = request.first_operation or num_before + 1
                history = self._watchers.history
                num_steps_told = history.num_taken
                await context.send_initial_metadata(())
                while True:
                    batch = await self._watchers.read(first_number)
                    first_number = batch.operations[-1].number + 1
                    batch = batch_told_to(caller, batch, self._log.owners.at)
                    steps, num_steps_told = history.read(num_steps_told)
                    batch = batch._replace(steps=steps)
                    await context.write(batch_to_proto(batch))

    async def Retain(  # noqa: N802 - the name is the contract's
        self, request: pb.RetainRequest, context: _Context
    ) -> pb.RetainResponse:
        """Keep the blocks of a prefix under a handle."""
        async with aborting(context):
            caller, desk = self._caller(context), self._desk
            check_request_id(request.request_id)
            if not request.HasField("time_to_live"):
                raise InvalidRequestError("HANDLE_TTL_MISSING", "say how long: time_to_live")
            ttl_ns = duration_to_ns(request.time_to_live)
            token_ids = list(request.token_ids)
            check_prefix(token_ids, self._facts)
            now_ns = self._clock.now_ns()
            name = self._handles.name_for(caller.tenant, request.request_id, token_ids, now_ns)
            facts = await self._call(
                context,
                lambda: desk.retain(
                    tenant=caller.tenant,
                    cache_salt=self._authenticator.cache_salt(caller.tenant),
                    name=name,
                    token_ids=token_ids,
                    ttl_ns=ttl_ns,
                    now_ns=self._clock.now_ns(),
                ),
            )
            self._handles.note_retained(caller.tenant, name, token_ids, facts.expire_ns)
            return retention_facts_to_proto(facts)
        raise AssertionError("aborting raises")

    async def Release(  # noqa: N802 - the name is the contract's
        self, request: pb.ReleaseRequest, context: _Context
    ) -> pb.ReleaseResponse:
        """Give a handle back."""
        async with aborting(context):
            caller, desk = self._caller(context), self._desk
            name = request.handle
            try:
                await self._call(context, lambda: desk.release(tenant=caller.tenant, name=name))
            except NotFoundError:
                if not self._handles.was_released(caller.tenant, name):
                    raise
            else:
                self._handles.note_released(caller.tenant, name)
            return pb.ReleaseResponse()
        raise AssertionError("aborting raises")

    async def SetQuota(  # noqa: N802 - the name is the contract's
        self, request: pb.SetQuotaRequest, context: _Context
    ) -> pb.SetQuotaResponse:
        """Set floor and ceiling of a tenant."""
        async with aborting(context):
            self._caller(context).check_operator("SetQuota")
            desk = self._desk
            if not request.HasField("quota"):
                raise InvalidRequestError("QUOTA_MISSING", "say which bounds: quota")
            quota = quota_from_proto(request.quota)
            check_tenant(quota.tenant)
            num_held = await self._call(context, lambda: desk.set_quota(quota))
            return pb.SetQuotaResponse(num_blocks_held=num_held)
        raise AssertionError("aborting raises")

    async def Resize(  # noqa: N802 - the name is the contract's
        self, request: pb.ResizeRequest, context: _Context
    ) -> pb.ResizeResponse:
        """Shrink or grow the pool."""
        async with aborting(context):
            self._caller(context).check_operator("Resize")
            desk = self._desk
            outcome = await self._call(context, lambda: desk.resize(request.num_blocks))
            return resize_outcome_to_proto(outcome)
        raise AssertionError("aborting raises")

    @property
    def _desk(self) -> MemoryDesk:
        if self._opened is None:
            raise UnavailableError("STARTING", "the model is being loaded; try again")
        return self._opened[0]

    @property
    def _facts(self) -> ReplicaFacts:
        assert self._opened is not None, "the desk was asked for first"
        return self._opened[1]

    def _caller(self, context: _Context) -> Caller:
        return self._authenticator.caller(authorization_of(context))

    async def _call(self, context: _Context, function: Callable[[], _Result]) -> _Result:
        """Run ``function`` between steps, unless by then nobody waits for it any more."""
        # None without a deadline, whatever the type says.
        remaining_s = cast("float | None", context.time_remaining())
        deadline_ns = None
        if remaining_s is not None and remaining_s <= _DEADLINE_MAX_S:
            deadline_ns = self._clock.now_ns() + int(remaining_s * NANOSECONDS_PER_SECOND)
        is_wanted = True

        def run() -> _Result:
            if not is_wanted:
                raise CancelledError("CALL_CANCELLED", "the caller has gone; nothing was done")
            if deadline_ns is not None and self._clock.now_ns() >= deadline_ns:
                raise DeadlineError("DEADLINE_PASSED", "the deadline passed; nothing was done")
            return function()

        try:
            return await self._steps.call(run)
        except asyncio.CancelledError:
            is_wanted = False
            raise

    def _publish(self) -> int:
        """Let watchers see everything up to now; returns the number of the last operation."""
        self._log.publish()
        return self._log.num_operations

    def _complete(self, snapshot: MemorySnapshot) -> MemorySnapshot:
        """What the log knows of the moment and of the sequences, added to what memory knows."""
        owners = [self._log.owners.of(table.sequence_id) for table in snapshot.tables]
        return replace(
            snapshot,
            operation=self._log.num_operations,
            pool_incarnation=self._pool_incarnation,
            tables=[
                replace(table, since_ns=0 if owner is None else owner.since_ns)
                for table, owner in zip(snapshot.tables, owners, strict=True)
            ],
        )

    def _with_last_operation(self, explanation: BlockExplanation) -> BlockExplanation:
        last = self._log.last_operation(explanation.block_id)
        if last is None:
            return explanation
        return replace(
            explanation,
            operation=last.operation,
            operation_number=last.number,
            cause=last.cause,
            step=last.step,
            time_ns=last.time_ns,
        )

    def _tenant_of(self, sequence_id: int) -> str | None:
        owner = self._log.owners.of(sequence_id)
        return None if owner is None else owner.tenant
