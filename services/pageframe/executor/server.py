"""The executor process: load the model, reserve the pool, serve steps."""

import asyncio
import os
from dataclasses import dataclass

import grpc

from pageframe.config.imports import collecting_no_garbage
from pageframe.config.launch import Launch
from pageframe.core.clock import SystemClock
from pageframe.core.errors import OutOfRangeError
from pageframe.core.trace import TraceSink
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.executor.batch import ModelFacts, ModelRunner
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.eviction import load_eviction_policy
from pageframe.executor.memory.pool_upkeep import record_size
from pageframe.executor.memory.retaining import SessionTimes
from pageframe.executor.memory_servicer import KvMemoryServicer
from pageframe.executor.metering import ExecutorMeter
from pageframe.executor.operation_log import OperationLog
from pageframe.executor.reading_ahead import read_ahead
from pageframe.executor.servicer import ExecutorServicer
from pageframe.executor.step_thread import StepThread
from pageframe.executor.torch_import import import_torch
from pageframe.rpc.access_file import AccessFile
from pageframe.rpc.lifecycle import Service, serve
from pageframe.rpc.ready import announce_progress
from pageframe.telemetry.metrics_door import MetricsDoor
from pageframe.telemetry.metrics_text import MetricsText
from pageframe.telemetry.sink import RingTraceSink
from pageframe.telemetry.spans import SERVICE_EXECUTOR
from pageframe.v1 import executor_service_pb2_grpc, kv_memory_service_pb2_grpc

SERVICE_NAMES = ("pageframe.v1.ExecutorService", "pageframe.v1.KvMemoryService")

KV_MEMORY_BYTES_DEFAULT = 1 << 30
"""What ``--kv-memory auto`` reserves on a CPU; pages are touched only as blocks are used."""


_GROWTH = 4
"""How many times its first size the pool may grow to, unless somebody says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    """Blocks of the pool, and the longest sequence that model and pool together allow."""

    num_blocks: int
    max_model_len: int


def size_pool(
    facts: ModelFacts,
    *,
    block_size: int,
    num_blocks: int,
    kv_memory_bytes: int,
    max_model_len: int,
) -> PoolSize:
    """Turn what was chosen into a number of blocks; 0 stands for "choose for me".

    Raises:
        OutOfRangeError: POOL_TOO_SMALL or MODEL_LEN_TOO_LONG, with the numbers.
    """
    block_bytes = block_size * facts.kv_bytes_per_token // facts.num_kv_groups
    blocks = num_blocks or (kv_memory_bytes or KV_MEMORY_BYTES_DEFAULT) // max(block_bytes, 1)
    if blocks < 1:
        raise OutOfRangeError(
            "POOL_TOO_SMALL",
            f"{kv_memory_bytes} bytes hold no block: one of {block_size} tokens takes "
            f"{block_bytes} bytes",
            kv_memory_bytes=kv_memory_bytes,
            block_bytes=block_bytes,
        )
    if max_model_len > facts.max_model_len:
        raise OutOfRangeError(
            "MODEL_LEN_TOO_LONG",
            f"max-model-len is {max_model_len}; {facts.name} was made for {facts.max_model_len} "
            "tokens",
            max_model_len=max_model_len,
            model_max_len=facts.max_model_len,
        )
    num_tokens = max(1, blocks // facts.num_kv_groups) * block_size
    wanted = max_model_len or min(facts.max_model_len, num_tokens)
    return PoolSize(num_blocks=blocks, max_model_len=wanted)


def num_host_slots(facts: ModelFacts, block_size: int, host_kv_memory_bytes: int) -> int:
    """How many blocks the host tier holds.

    Raises:
        OutOfRangeError: HOST_TIER_TOO_SMALL, when memory was asked for that holds no block.
    """
    block_bytes = block_size * facts.kv_bytes_per_token // facts.num_kv_groups
    num_slots = host_kv_memory_bytes // max(block_bytes, 1)
    if host_kv_memory_bytes and not num_slots:
        raise OutOfRangeError(
            "HOST_TIER_TOO_SMALL",
            f"{host_kv_memory_bytes} bytes hold no block: one of {block_size} tokens takes "
            f"{block_bytes} bytes",
            host_kv_memory_bytes=host_kv_memory_bytes,
            block_bytes=block_bytes,
        )
    return num_slots


async def serve_executor(launch: Launch) -> None:
    """Serve until told to stop."""
    clock = SystemClock()
    incarnation = clock.now_ns()
    trace = RingTraceSink.create(
        launch.ring_path("executor"),
        SERVICE_EXECUTOR,
        launch.settings.trace,
        incarnation=incarnation,
    )
    log = OperationLog(trace, clock)
    steps = StepThread(asyncio.get_running_loop())
    steps.watch(log.flush)
    access_file = AccessFile(launch.settings.api_keys)
    authenticator = access_file.authenticator()
    servicer = ExecutorServicer(steps, pool_incarnation=incarnation)
    memory_servicer = KvMemoryServicer(
        steps, log, authenticator, clock, pool_incarnation=incarnation
    )
    built: list[StepEngine] = []
    meter = ExecutorMeter(lambda: log.num_operations, lambda: trace.num_dropped)
    text = MetricsText(lambda: meter.read(built[0].memory if built else None))
    metrics_door = MetricsDoor(
        launch.settings.metrics_port_of("executor"), text.render, host=launch.settings.metrics_host
    )

    def register(server: grpc.aio.Server) -> None:
        executor_service_pb2_grpc.add_ExecutorServiceServicer_to_server(servicer, server)
        kv_memory_service_pb2_grpc.add_KvMemoryServiceServicer_to_server(memory_servicer, server)

    def build() -> StepEngine:
        with collecting_no_garbage():
            engine = build_engine(launch, log)
        built.append(engine)
        return engine

    async def start() -> None:
        await metrics_door.start()
        await steps.start(build)
        facts = built[0].describe(launch.settings.model)
        servicer.open(facts)
        memory_servicer.open(built[0].desk, facts)

    async def close() -> None:
        await metrics_door.stop()
        await steps.stop()
        for engine in built:
            engine.close()
        trace.close()

    await serve(
        Service(
            name=SERVICE_EXECUTOR,
            address=launch.executor_address,
            service_names=SERVICE_NAMES,
            register=register,
            start=start,
            drain=memory_servicer.drain,
            close=close,
            background=[steps.wait_ended, access_file.watch],
            details=lambda: _details(built[0]),
            tls=launch.settings.server_tls(),
            keepalive=launch.settings.keepalive(),
        )
    )


def _details(engine: StepEngine) -> dict[str, str]:
    """What computes, in a word; why it is not the other was told while weights were loaded."""
    kernels = engine.describe("").kernels
    return {"kernels": kernels.split()[0]} if kernels else {}


def build_engine(launch: Launch, trace: TraceSink) -> StepEngine:
    """Load the model and reserve the pool; runs on the step thread."""
    settings = launch.settings
    # Read by OpenMP when torch is imported. Workers that wait must sleep: one that spins keeps a
    # core from whatever the others wait for (docs/performance.md has the figures).
    os.environ["OMP_NUM_THREADS"] = str(launch.num_threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    runner = _load_runner(launch)
    size = size_pool(
        runner.facts,
        block_size=settings.block_size,
        num_blocks=settings.num_blocks,
        kv_memory_bytes=settings.kv_memory_bytes,
        max_model_len=settings.max_model_len,
    )
    engine = StepEngine(
        runner,
        num_blocks=size.num_blocks,
        block_size=settings.block_size,
        max_num_sequences=settings.max_num_sequences,
        max_step_tokens=max(settings.token_budget, settings.max_num_sequences),
        max_model_len=size.max_model_len,
        trace=trace,
        clock=SystemClock(),
        num_blocks_max=settings.num_blocks_max or _GROWTH * size.num_blocks,
        num_host_slots=num_host_slots(
            runner.facts, settings.block_size, settings.host_kv_memory_bytes
        ),
        has_prefix_cache=settings.prefix_cache,
        eviction=load_eviction_policy(settings.eviction_policy),
        session_times=SessionTimes(
            idle_ns=round(settings.session_idle_seconds * NANOSECONDS_PER_SECOND),
            ttl_ns=round(settings.session_ttl_seconds * NANOSECONDS_PER_SECOND),
        ),
        handle_ttl_max_ns=round(settings.handle_ttl_max_seconds * NANOSECONDS_PER_SECOND),
    )
    record_size(engine.memory.pool)
    announce_progress("warming up")
    runner.warm_up()
    return engine


_LONG_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _load_runner(launch: Launch) -> ModelRunner:
    read_ahead(launch.model_path)
    # Imported here: torch takes seconds, and health has to answer before that.
    import_torch()
    import torch

    from pageframe.executor.model.loader import load_runner
    from pageframe.executor.model.sim import SimCost

    settings = launch.settings
    torch.set_num_threads(launch.num_threads)
    runner = load_runner(
        str(launch.model_path),
        runner=settings.runner.value,
        device=settings.device,
        dtype=_LONG_DTYPES.get(settings.dtype.value, settings.dtype.value),
        kv_dtype=_LONG_DTYPES.get(settings.kv_dtype.value, settings.kv_dtype.value),
        name=settings.model,
        max_num_sequences=settings.max_num_sequences,
        max_step_tokens=max(settings.token_budget, settings.max_num_sequences),
        cpu_kernels=settings.cpu_kernels.value,
        is_deterministic=settings.deterministic,
        has_graphs=settings.cuda_graphs,
        sim_cost=SimCost(step_ns=settings.sim_step_seconds * NANOSECONDS_PER_SECOND),
        progress=announce_progress,
    )
    if runner.facts.kernels:
        announce_progress(f"weights loaded, kernels={runner.facts.kernels}")
    return runner
