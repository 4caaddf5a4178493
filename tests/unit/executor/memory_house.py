"""KV memory's service over real gRPC on a Unix socket, in front of a small real engine.

Blocks of 4 tokens, 12 of them, room for 24; tokens come from the simulated model.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
from google.protobuf import duration_pb2

from pageframe.core.clock import ManualClock
from pageframe.core.errors import PageframeError
from pageframe.core.plan import Announcement, Entries, StepPlan
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import StepResult
from pageframe.core.trace import NullTraceSink
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory_servicer import KvMemoryServicer
from pageframe.executor.model.sim import SimConfig, SimRunner
from pageframe.executor.operation_log import OperationLog
from pageframe.executor.servicer import ExecutorServicer
from pageframe.executor.step_thread import StepThread
from pageframe.rpc.auth import Authenticator, Caller
from pageframe.rpc.status import from_rpc_error
from pageframe.v1 import executor_service_pb2_grpc, kv_memory_service_pb2_grpc
from pageframe.v1 import kv_memory_service_pb2 as pb
from pageframe.wire.kv_memory import snapshot_from_proto
from pageframe.wire.memory_facts import MemorySnapshot

PATIENCE_S = 30
MINUTE = duration_pb2.Duration(seconds=60)
INCARNATION = 77
VOCAB_SIZE = 1000
MAX_MODEL_LEN = 32
KEYS = {
    "k-red": Caller("red"),
    "k-blue": Caller("blue"),
    "k-op": Caller("ops", is_operator=True),
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


class CountingSteps(StepThread):
    """Counts who waits for the step thread, and who has given up waiting."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.num_calls = 0
        self.num_given_up = 0

    async def call(self, function: Callable[[], object]) -> object:
        self.num_calls += 1
        try:
            return await super().call(function)
        except asyncio.CancelledError:
            self.num_given_up += 1
            raise


class MemoryHouse:
    """The server, what stands behind it, and a way to run steps."""

    def __init__(self, channel: grpc.aio.Channel, keys: dict[str, Caller], **bounds: int) -> None:
        self.clock = ManualClock(1_700_000_000 * 10**9)
        self.log = OperationLog(NullTraceSink(), self.clock, **bounds)
        self.authenticator = Authenticator(keys)
        self.steps = CountingSteps(asyncio.get_running_loop(), self.clock)
        self.steps.watch(self.log.flush)
        self.servicer = KvMemoryServicer(
            self.steps, self.log, self.authenticator, self.clock, pool_incarnation=INCARNATION
        )
        # It counts blocks; plans never come this way here.
        self.inner = ExecutorServicer(self.steps, pool_incarnation=INCARNATION)
        self.stub = kv_memory_service_pb2_grpc.KvMemoryServiceStub(channel)
        self.engine: StepEngine

    async def start(self, *, is_open: bool) -> None:
        """Build the engine on its thread."""

        def build() -> StepEngine:
            self.engine = StepEngine(
                SimRunner(SimConfig(vocab_size=VOCAB_SIZE, max_model_len=256)),
                num_blocks=12,
                num_blocks_max=24,
                block_size=4,
                max_num_sequences=4,
                max_step_tokens=32,
                max_model_len=MAX_MODEL_LEN,
                trace=self.log,
                clock=self.clock,
            )
            return self.engine

        await self.steps.start(build)
        if is_open:
            self.servicer.open(self.engine.desk, self.engine.describe("sim"))
            self.inner.open(self.engine.describe("sim"))

    async def step(self, **changes: object) -> StepResult:
        """Run the next plan."""
        memory = self.engine.memory
        plan = StepPlan(
            step=memory.last_received_step + 1, builds_on=memory.last_applied_step, **changes
        )
        result = await self.steps.call(lambda: self.engine.step(plan))
        assert not result.refusal, result.refusal
        return result

    async def run(self, sequence_id: int, num_tokens: int, tenant: str = "default") -> StepResult:
        """Announce, admit and compute a prompt: ids from ``100 * sequence_id`` on."""
        announcement = Announcement(
            sequence_id=sequence_id,
            token_ids=prompt(sequence_id, num_tokens),
            num_prompt_tokens=num_tokens,
            sampling=GREEDY,
            request_id=f"r{sequence_id}",
            tenant=tenant,
            cache_salt=self.authenticator.cache_salt(tenant),
        )
        may = Entries([sequence_id], [0], [num_tokens])
        return await self.step(announce=[announcement], may=may)

    async def pass_time(self) -> None:
        """Have what is due done, as the step thread does by itself when it is at rest."""
        await self.steps.call(self.engine.desk.pass_time)

    async def finish(self, *sequence_ids: int) -> None:
        """End sequences, in a step of their own."""
        await self.step(finish=list(sequence_ids))

    @contextlib.asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Keep the step thread from doing anything else while the block runs."""
        has_begun, may_end = threading.Event(), threading.Event()

        def wait() -> None:
            has_begun.set()
            assert may_end.wait(PATIENCE_S)

        task = asyncio.create_task(self.steps.call(wait))
        assert await asyncio.to_thread(has_begun.wait, PATIENCE_S)
        try:
            yield
        finally:
            may_end.set()
            await task

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the server have its turns until it has come so far; each answer is one."""
        while not condition():
            error = await self.refusal("Retain", pb.RetainRequest(time_to_live=MINUTE))
            assert error.reason == "PREFIX_EMPTY"

    async def settle(self) -> None:
        """Wait until the step thread has done everything it was told."""
        await self.steps.call(lambda: None)

    async def call(self, method: str, request: object, key: str = "", **options: object) -> object:
        """Call a method that answers once."""
        options = {"timeout": PATIENCE_S, "metadata": as_metadata(key)} | options
        return await getattr(self.stub, method)(request, **options)

    async def refusal(self, method: str, request: object, key: str = "") -> PageframeError:
        """How a call is refused."""
        if method == "Watch":
            return await end_of(self.watch(key, request))
        try:
            answer = await self.call(method, request, key)
        except grpc.RpcError as error:
            return from_rpc_error(error)
        raise AssertionError(f"not refused: {answer}")

    def watch(
        self, key: str = "", request: pb.WatchRequest | None = None
    ) -> grpc.aio.UnaryStreamCall:
        """Begin to watch; see ``watching`` to wait until the server has begun, too."""
        return self.stub.Watch(
            request or pb.WatchRequest(), timeout=2 * PATIENCE_S, metadata=as_metadata(key)
        )

    async def watching(self, key: str = "", **request: int) -> grpc.aio.UnaryStreamCall:
        """A watch that the server has begun."""
        call = self.watch(key, pb.WatchRequest(**request))
        await asyncio.wait_for(call.initial_metadata(), PATIENCE_S)
        return call


def prompt(sequence_id: int, num_tokens: int) -> list[int]:
    return [100 * sequence_id + index for index in range(num_tokens)]


def as_metadata(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),) if key else ()


async def heard(call: grpc.aio.UnaryStreamCall) -> pb.WatchResponse:
    """The next message; an end is an error."""
    message = await asyncio.wait_for(call.read(), PATIENCE_S)
    assert isinstance(message, pb.WatchResponse), "the watch has ended"
    return message


async def end_of(call: grpc.aio.UnaryStreamCall) -> PageframeError:
    """How a watch ends; nothing may come before that."""
    try:
        message = await asyncio.wait_for(call.read(), PATIENCE_S)
    except grpc.RpcError as error:
        return from_rpc_error(error)
    raise AssertionError(f"not refused: {message}")


@contextlib.asynccontextmanager
async def memory_house(
    folder: object, *, keys: dict[str, Caller] | None = None, is_open: bool = True, **bounds: int
) -> AsyncIterator[MemoryHouse]:
    """Serve on a socket in ``folder`` while the block runs."""
    address = f"unix:{folder}/executor.sock"
    server = grpc.aio.server()
    async with grpc.aio.insecure_channel(address) as channel:
        house = MemoryHouse(channel, keys or {}, **bounds)
        kv_memory_service_pb2_grpc.add_KvMemoryServiceServicer_to_server(house.servicer, server)
        executor_service_pb2_grpc.add_ExecutorServiceServicer_to_server(house.inner, server)
        server.add_insecure_port(address)
        await server.start()
        await house.start(is_open=is_open)
        try:
            yield house
        finally:
            await server.stop(None)
            await house.steps.stop()


def run_in_house(
    folder: object, scenario: Callable[[MemoryHouse], Awaitable[None]], **options: object
) -> None:
    """Run a scenario to its end."""

    async def main() -> None:
        async with memory_house(folder, **options) as house:
            await asyncio.wait_for(scenario(house), 2 * PATIENCE_S)

    asyncio.run(main())


async def snapshot_of(house: MemoryHouse, key: str = "") -> MemorySnapshot:
    request = pb.KvMemoryServiceSnapshotRequest()
    return snapshot_from_proto(await house.call("Snapshot", request, key))


def retain(
    token_ids: list[int], request_id: str = "", ttl: duration_pb2.Duration = MINUTE
) -> pb.RetainRequest:
    return pb.RetainRequest(request_id=request_id, token_ids=token_ids, time_to_live=ttl)


def brief(error: PageframeError) -> tuple[str, str]:
    """Status and reason."""
    return (error.status, error.reason)
