"""The scheduler's gRPC face: one stream per gateway, many requests on it."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration

from pageframe.core.clock import Clock
from pageframe.core.errors import AbortedError, PageframeError, PreconditionError
from pageframe.core.limits import LIMITS
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Completion, TokenEvents
from pageframe.core.step import FinishReason
from pageframe.rpc.handlers import aborting
from pageframe.scheduler.loop import SchedulerLoop
from pageframe.scheduler.snapshot import SequenceSnapshot
from pageframe.v1 import scheduler_service_pb2 as pb
from pageframe.v1 import scheduler_service_pb2_grpc
from pageframe.wire.replica import pool_to_proto, replica_to_proto
from pageframe.wire.request import events_to_proto, submission_from_proto

_log = structlog.get_logger(__name__)

_ANSWER_S = 0.1

_ConnectContext = grpc.aio.ServicerContext[pb.ConnectRequest, pb.ConnectResponse]


class SchedulerServicer(scheduler_service_pb2_grpc.SchedulerServiceServicer):
    """Serves ``pageframe.v1.SchedulerService`` over one loop.

    Args:
        loop: The loop around the core.
        clock: Source of time.
    """

    def __init__(self, loop: SchedulerLoop, clock: Clock) -> None:
        self._loop = loop
        self._clock = clock
        self._numbers = itertools.count(1)
        self._gateways: dict[str, _Gateway] = {}
        loop.on_facts = self._tell_facts

    async def Connect(  # noqa: N802 - the name is the contract's
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: _ConnectContext
    ) -> AsyncIterator[pb.ConnectResponse]:
        """Carry one gateway's requests and their token events."""
        async with aborting(context):
            requests = aiter(request_iterator)
            gateway = await self._welcome(requests)
            reader = asyncio.create_task(self._read(requests, gateway))
            try:
                async for response in gateway.responses():
                    yield response
            finally:
                reader.cancel()
                self._part(gateway)

    async def Snapshot(  # noqa: N802 - the name is the contract's
        self,
        request: pb.SnapshotRequest,
        context: "grpc.aio.ServicerContext[pb.SnapshotRequest, pb.SnapshotResponse]",
    ) -> pb.SnapshotResponse:
        """Show queues and running sequences."""
        async with aborting(context):
            return self._snapshot()
        raise AssertionError("aborting raises")

    async def Drain(  # noqa: N802 - the name is the contract's
        self,
        request: pb.DrainRequest,
        context: "grpc.aio.ServicerContext[pb.DrainRequest, pb.DrainResponse]",
    ) -> pb.DrainResponse:
        """Refuse new requests and wait for the living ones, at most until the deadline."""
        async with aborting(context):
            await self.drain(_within(context.time_remaining()))
            return pb.DrainResponse(num_requests_left=self._loop.scheduler.snapshot().num_requests)
        raise AssertionError("aborting raises")

    async def drain(self, timeout_s: float | None) -> None:
        """Refuse new requests and wait for the living ones."""
        self._loop.scheduler.drain()
        try:
            async with asyncio.timeout(timeout_s):
                await self._loop.wait_idle()
        except TimeoutError:
            _log.warning("drain_timeout", num_requests=self._loop.scheduler.snapshot().num_requests)

    async def _welcome(self, requests: AsyncIterator[pb.ConnectRequest]) -> "_Gateway":
        first = await anext(requests, None)
        if first is None or not first.HasField("hello") or not first.hello.gateway_id:
            raise PreconditionError("HELLO_EXPECTED", "the first message must be a hello")
        await self._loop.wait_first_executor()
        gateway = _Gateway(first.hello.gateway_id, next(self._numbers))
        replaced = self._gateways.pop(gateway.name, None)
        if replaced is not None:
            self._loop.detach(replaced.number)
            replaced.end(AbortedError("TAKEN_OVER", "the same gateway connected again"))
        self._gateways[gateway.name] = gateway
        self._loop.attach(gateway.number, gateway.deliver)
        gateway.say_hello(self._loop.facts)
        _log.info("gateway_connected", gateway=gateway.name)
        return gateway

    def _tell_facts(self, facts: ReplicaFacts) -> None:
        for gateway in self._gateways.values():
            gateway.say_hello(facts)

    def _part(self, gateway: "_Gateway") -> None:
        """Take back what a lost gateway asked for; one that came back has been detached already.

        Nobody reads these tokens any more. A gateway that lives submits again what it still wants,
        and finds what was computed in the prefix cache; one that died must not hold slots and
        places in line that its callers need, who ask again elsewhere by now.
        """
        if self._gateways.get(gateway.name) is gateway:
            del self._gateways[gateway.name]
            self._loop.detach(gateway.number)
            _log.info("gateway_lost", gateway=gateway.name)

    async def _read(self, requests: AsyncIterator[pb.ConnectRequest], gateway: "_Gateway") -> None:
        try:
            async for request in requests:
                self._dispatch(request, gateway)
        except Exception as error:
            # Our bugs too: a stream that nobody reads any more must not stay open.
            gateway.end(error)
        else:
            gateway.end(None)

    def _dispatch(self, request: pb.ConnectRequest, gateway: "_Gateway") -> None:
        kind = request.WhichOneof("message")
        if kind == "submit":
            try:
                self._loop.submit(gateway.number, submission_from_proto(request.submit))
            except PageframeError as error:
                _log.info(
                    "refused",
                    request_id=request.submit.request_id,
                    trace_id=request.submit.trace_id.hex(),
                    reason=error.reason,
                )
                gateway.deliver(_refusal(request.submit, error))
        elif kind == "cancel":
            cancel = request.cancel
            sample = cancel.sample_index if cancel.HasField("sample_index") else None
            self._loop.cancel(gateway.number, cancel.handle, sample)
        elif kind == "orders":
            for order in request.orders.orders:
                self._dispatch(order, gateway)
        else:
            raise PreconditionError(
                "UNEXPECTED_MESSAGE", f"a {kind or 'message of no kind'} is not expected here"
            )

    def _snapshot(self) -> pb.SnapshotResponse:
        snapshot = self._loop.scheduler.snapshot()
        now_ns = self._clock.now_ns()
        return pb.SnapshotResponse(
            num_waiting=snapshot.num_waiting,
            num_running=snapshot.num_running,
            num_preempted=snapshot.num_preempted,
            num_steps_in_flight=snapshot.num_plans_in_flight,
            last_step=snapshot.step,
            pool=pool_to_proto(snapshot.account),
            executor_connected=self._loop.is_connected,
            sequences=[_sequence_to_proto(entry, now_ns) for entry in snapshot.sequences],
            policies=[pb.PolicyAccount(**count._asdict()) for count in snapshot.policies],
        )


class _Gateway:
    """One gateway's stream: what waits to be written, merged behind an unfinished write."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self._hello: ReplicaFacts | None = None
        self._pending: list[TokenEvents] = []
        self._wake = asyncio.Event()
        self._ended = False
        self._error: Exception | None = None

    def say_hello(self, facts: ReplicaFacts) -> None:
        """Tell what is served, ahead of any events; again when it has changed."""
        self._hello = facts
        self._wake.set()

    def deliver(self, events: TokenEvents) -> None:
        """Queue events."""
        self._pending.append(events)
        self._wake.set()

    def end(self, error: Exception | None) -> None:
        """Close the stream, with an error or without."""
        self._ended = True
        self._error = error
        self._wake.set()

    async def responses(self) -> AsyncIterator[pb.ConnectResponse]:
        """What comes until the end; raises the error the stream ended with."""
        while not self._ended:
            await self._wake.wait()
            self._wake.clear()
            if self._hello is not None:
                hello = pb.ConnectHello(replica=replica_to_proto(self._hello))
                self._hello = None
                yield pb.ConnectResponse(hello=hello)
            if self._pending:
                merged = TokenEvents.merge(self._pending)
                self._pending = []
                yield pb.ConnectResponse(events=events_to_proto(merged))
        if self._error is not None:
            raise self._error


def _within(time_remaining_s: float | None) -> float | None:
    """How long to work, so that the answer still arrives before the caller's deadline."""
    return None if time_remaining_s is None else max(0.0, time_remaining_s - _ANSWER_S)


def _sequence_to_proto(sequence: SequenceSnapshot, now_ns: int) -> pb.SequenceSnapshot:
    age = Duration()
    age.FromNanoseconds(max(0, now_ns - sequence.submit_ns))
    return pb.SequenceSnapshot(
        sequence_id=sequence.sequence_id,
        request_id=sequence.request_id,
        tenant=sequence.tenant,
        state=sequence.state.name.lower(),
        num_computed_tokens=sequence.num_computed_tokens,
        num_tokens=sequence.num_prompt_tokens + sequence.num_output_tokens,
        age=age,
    )


def _refusal(message: pb.Submission, error: PageframeError) -> TokenEvents:
    """One completion per sample, so that a gateway hears of a refusal as of any other end."""
    return TokenEvents(
        step=0,
        completions=[
            Completion(
                handle=message.handle,
                sample_index=index,
                finish_reason=FinishReason.ERROR,
                num_prompt_tokens=len(message.prompt_token_ids),
                error_status=error.status,
                error_reason=error.reason,
                error_message=error.message,
                error_limits=dict(error.limits),
            )
            for index in range(max(1, min(message.num_samples, LIMITS.num_samples_max)))
        ],
    )
