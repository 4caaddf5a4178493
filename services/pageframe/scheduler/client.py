"""The scheduler's stream to its executor: hello, plans out, results in."""

from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from pageframe.core.errors import PreconditionError
from pageframe.core.plan import StepPlan
from pageframe.core.replica import PoolAccount, ReplicaFacts, TenantQuota
from pageframe.core.step import StepResult
from pageframe.rpc.channel import open_inner_channel
from pageframe.rpc.status import from_rpc_error, stream_error
from pageframe.v1 import executor_service_pb2 as pb
from pageframe.v1 import executor_service_pb2_grpc
from pageframe.wire.plan import plan_to_proto
from pageframe.wire.replica import pool_from_proto, quota_to_proto, replica_from_proto
from pageframe.wire.step import refusal_from_proto, result_from_proto


class GrpcExecutorStream:
    """One connected stream. A lost stream is never mended: open a new one, with a higher epoch."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        call: "grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse]",
        facts: ReplicaFacts,
        pool: PoolAccount,
    ) -> None:
        self.facts = facts
        self.pool = pool
        self._channel = channel
        self._call = call

    @classmethod
    async def open(
        cls,
        address: str,
        scheduler_id: str,
        epoch: int,
        *,
        quotas: Sequence[TenantQuota] = (),
        open_channel: Callable[[str], grpc.aio.Channel] = open_inner_channel,
    ) -> "GrpcExecutorStream":
        """Connect and introduce the scheduler, with the quotas that hold from now on.

        Raises:
            PageframeError: what the executor or the transport answers.
        """
        channel = open_channel(address)
        try:
            call = executor_service_pb2_grpc.ExecutorServiceStub(channel).Run(wait_for_ready=True)
            hello = pb.SchedulerHello(
                scheduler_id=scheduler_id, epoch=epoch, quotas=map(quota_to_proto, quotas)
            )
            await call.write(pb.RunRequest(hello=hello))
            response = await call.read()
        except grpc.RpcError as error:
            await channel.close()
            raise from_rpc_error(error) from error
        except BaseException:
            await channel.close()
            raise
        if not isinstance(response, pb.RunResponse):
            ended = await stream_error(call)
            await channel.close()
            raise ended
        if not response.HasField("hello"):
            # The stream lives, so waiting for its end could last for ever.
            kind = response.WhichOneof("message")
            await channel.close()
            raise PreconditionError("HELLO_EXPECTED", f"the executor began with a {kind}")
        facts = replica_from_proto(response.hello.replica)
        return cls(channel, call, facts, pool_from_proto(response.hello.pool))

    async def send_plan(self, plan: StepPlan) -> None:
        """Send one plan.

        Raises:
            PageframeError: the stream is lost.
        """
        await self._write(pb.RunRequest(plan=plan_to_proto(plan)))

    async def send_cancel(self, sequence_ids: list[int]) -> None:
        """Have sequences ended at once.

        Raises:
            PageframeError: the stream is lost.
        """
        await self._write(pb.RunRequest(cancel=pb.CancelSequences(sequence_ids=sequence_ids)))

    async def send_quotas(self, quotas: Sequence[TenantQuota]) -> None:
        """Bound tenants otherwise, from the next plan on.

        Raises:
            PageframeError: the stream is lost.
        """
        message = pb.TenantQuotas(quotas=map(quota_to_proto, quotas))
        await self._write(pb.RunRequest(quotas=message))

    async def results(self) -> AsyncIterator[StepResult]:
        """Results and refusals, in the order of their plans, until the stream is lost.

        Raises:
            PageframeError: how the stream ended; it never ends well.
        """
        try:
            while isinstance(response := await self._call.read(), pb.RunResponse):
                yield _result_of(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        raise await stream_error(self._call)

    async def close(self) -> None:
        """End the stream and its channel."""
        self._call.cancel()
        await self._channel.close()

    async def _write(self, request: pb.RunRequest) -> None:
        try:
            await self._call.write(request)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        except Exception as error:
            # grpc.aio reports a write on an ended call as an InvalidStateError.
            raise await stream_error(self._call) from error


def _result_of(response: pb.RunResponse) -> StepResult:
    kind = response.WhichOneof("message")
    if kind == "result":
        return result_from_proto(response.result)
    if kind == "refusal":
        return refusal_from_proto(response.refusal)
    raise PreconditionError(
        "UNEXPECTED_MESSAGE", f"a {kind or 'message of no kind'} is not expected here"
    )
