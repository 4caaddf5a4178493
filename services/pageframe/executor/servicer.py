"""The executor's gRPC face: one scheduler's stream at a time, plans in, results out."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import structlog

from pageframe.core.errors import (
    AbortedError,
    PreconditionError,
    UnavailableError,
)
from pageframe.core.replica import ReplicaFacts
from pageframe.core.step import StepResult
from pageframe.executor.step_thread import Session, StepThread
from pageframe.rpc.handlers import aborting
from pageframe.v1 import executor_service_pb2 as pb
from pageframe.v1 import executor_service_pb2_grpc
from pageframe.wire.plan import plan_from_proto
from pageframe.wire.replica import pool_to_proto, quota_from_proto, replica_to_proto
from pageframe.wire.step import refusal_to_proto, result_to_proto

_log = structlog.get_logger(__name__)

_RunContext = grpc.aio.ServicerContext[pb.RunRequest, pb.RunResponse]
_Outbox = asyncio.Queue[pb.RunResponse]


class ExecutorServicer(executor_service_pb2_grpc.ExecutorServiceServicer):
    """Serves ``pageframe.v1.ExecutorService`` over one step thread."""

    def __init__(self, steps: StepThread, *, pool_incarnation: int) -> None:
        self._steps = steps
        self._served: ReplicaFacts | None = None
        self._pool_incarnation = pool_incarnation
        self._connected: _Connection | None = None
        self._epochs: dict[str, int] = {}

    def open(self, facts: ReplicaFacts) -> None:
        """Serve from now on; calls before this are refused with UNAVAILABLE."""
        self._served = facts

    @property
    def _facts(self) -> ReplicaFacts:
        if self._served is None:
            raise UnavailableError("STARTING", "the model is being loaded; try again")
        return self._served

    async def Describe(  # noqa: N802 - the name is the contract's
        self,
        request: pb.DescribeRequest,
        context: "grpc.aio.ServicerContext[pb.DescribeRequest, pb.DescribeResponse]",
    ) -> pb.DescribeResponse:
        """Tell what is served."""
        async with aborting(context):
            facts = self._facts
            pool = await self._steps.account()
            replica = replica_to_proto(replace(facts, num_blocks=pool.total))
            return pb.DescribeResponse(replica=replica, pool=pool_to_proto(pool))
        raise AssertionError("aborting raises")

    async def Run(  # noqa: N802 - the name is the contract's
        self, request_iterator: AsyncIterator[pb.RunRequest], context: _RunContext
    ) -> AsyncIterator[pb.RunResponse]:
        """Carry one scheduler's plans and their results."""
        async with aborting(context):
            requests = aiter(request_iterator)
            connection = await self._connect(requests)
            reader = asyncio.create_task(self._read(requests, connection))
            try:
                async for response in connection.responses():
                    yield response
            finally:
                reader.cancel()
                self._part(connection)

    async def _connect(self, requests: AsyncIterator[pb.RunRequest]) -> "_Connection":
        first = await anext(requests, None)
        if first is None or first.WhichOneof("message") != "hello":
            raise PreconditionError("HELLO_EXPECTED", "the first message must be a hello")
        hello = first.hello
        replica = replica_to_proto(self._facts)
        self._check_epoch(hello)
        quotas = [quota_from_proto(quota) for quota in hello.quotas]
        connection = _Connection(hello.scheduler_id)
        replaced, self._connected = self._connected, connection
        self._epochs[hello.scheduler_id] = hello.epoch
        if replaced is not None:
            replaced.end(
                AbortedError("TAKEN_OVER", "the same scheduler connected again with a higher epoch")
            )
        try:
            pool = await self._steps.take_over(connection.session, quotas)
        except BaseException:
            # It was lost while it waited for the running step.
            self._part(connection)
            raise
        _log.info("scheduler_connected", scheduler=hello.scheduler_id, epoch=hello.epoch)
        num_floor_blocks = sum(quota.floor_blocks for quota in quotas)
        if num_floor_blocks > pool.total:
            _log.warning("floors_cut", num_floor_blocks=num_floor_blocks, num_blocks=pool.total)
        connection.greet(
            pb.RunResponse(
                hello=pb.ExecutorHello(
                    replica=replica,
                    pool=pool_to_proto(pool),
                    pool_incarnation=self._pool_incarnation,
                )
            )
        )
        return connection

    def _part(self, connection: "_Connection") -> None:
        connection.session.close()
        if self._connected is connection:
            self._connected = None

    def _check_epoch(self, hello: pb.SchedulerHello) -> None:
        if not hello.scheduler_id:
            raise PreconditionError("SCHEDULER_ID_MISSING", "a hello must name its scheduler")
        connected = self._connected
        if connected is not None and connected.scheduler_id != hello.scheduler_id:
            raise PreconditionError(
                "SCHEDULER_CONNECTED",
                f"scheduler {connected.scheduler_id} is connected; an executor serves one",
                connected=connected.scheduler_id,
                refused=hello.scheduler_id,
            )
        seen = self._epochs.get(hello.scheduler_id, 0)
        if hello.epoch <= seen:
            raise PreconditionError(
                "EPOCH_TOO_OLD",
                f"epoch {hello.epoch} is not above {seen}, which this executor has seen",
                epoch=hello.epoch,
                epoch_seen=seen,
            )

    async def _read(
        self, requests: AsyncIterator[pb.RunRequest], connection: "_Connection"
    ) -> None:
        try:
            async for request in requests:
                self._dispatch(request, connection)
        except Exception as error:
            # Our bugs too: a stream that nobody reads any more must not stay open.
            connection.end(error)
        else:
            connection.end(None)

    def _dispatch(self, request: pb.RunRequest, connection: "_Connection") -> None:
        kind = request.WhichOneof("message")
        if kind == "plan":
            self._steps.post_plan(connection.session, plan_from_proto(request.plan))
        elif kind == "cancel":
            self._steps.post_cancel(connection.session, list(request.cancel.sequence_ids))
        elif kind == "quotas":
            quotas = [quota_from_proto(quota) for quota in request.quotas.quotas]
            self._steps.post_quotas(connection.session, quotas)
        else:
            raise PreconditionError(
                "UNEXPECTED_MESSAGE", f"a {kind or 'message of no kind'} is not expected here"
            )


class _Connection:
    """One stream: its session on the step thread, and what waits to be written."""

    def __init__(self, scheduler_id: str) -> None:
        self.scheduler_id = scheduler_id
        self.outbox: _Outbox = asyncio.Queue()
        self.session = Session(self._deliver)
        self._loop = asyncio.get_running_loop()
        self._end: Exception | None = None
        # What the step thread told before the hello was answered; None behind that.
        self._early: list[pb.RunResponse] | None = []

    def greet(self, hello: pb.RunResponse) -> None:
        """Answer the hello; what happened to the pool since then follows it."""
        for response in (hello, *(self._early or ())):
            self.outbox.put_nowait(response)
        self._early = None

    def end(self, error: Exception | None) -> None:
        """Close the stream, with an error or without."""
        self.session.close()
        self._end = error
        self.outbox.put_nowait(_END)

    async def responses(self) -> AsyncIterator[pb.RunResponse]:
        """What comes until the end; raises the error the stream ended with."""
        while (response := await self.outbox.get()) is not _END:
            yield response
        if self._end is not None:
            raise self._end

    def _deliver(self, result: StepResult, last_applied_step: int) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._enqueue, result, last_applied_step)

    def _enqueue(self, result: StepResult, last_applied_step: int) -> None:
        # Encoded here and not on the step thread: there it would delay the next step.
        if result.refusal:
            response = pb.RunResponse(refusal=refusal_to_proto(result, last_applied_step))
        else:
            response = pb.RunResponse(result=result_to_proto(result))
        if self._early is None:
            self.outbox.put_nowait(response)
        else:
            self._early.append(response)


_END = pb.RunResponse()
