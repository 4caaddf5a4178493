"""The three services as processes of a simulation: started, killed, and started again.

Each consists of the same parts that its ``server`` module puts together, but for the network, the
clock, the runner and the thread.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from pageframe.core.replica import ReplicaFacts
from pageframe.core.trace import NullTraceSink
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.executor.memory.eviction import load_eviction_policy
from pageframe.executor.memory.retaining import SessionTimes
from pageframe.executor.model.sim import SimConfig, SimCost
from pageframe.executor.servicer import ExecutorServicer
from pageframe.gateway.client import SchedulerLink
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.servicer import GatewayServicer
from pageframe.lab.simulation.call import pause
from pageframe.lab.simulation.faulty import FaultyRunner, WatchedEngine
from pageframe.lab.simulation.letters import LetterCodecs
from pageframe.lab.simulation.network import Network
from pageframe.lab.simulation.scenario import MAX_MODEL_LEN, MODEL, TENANTS, Scenario
from pageframe.lab.simulation.virtual_steps import VirtualSteps
from pageframe.lab.simulation.virtual_time import Process, VirtualClock
from pageframe.rpc.auth import Authenticator, Caller
from pageframe.scheduler.client import GrpcExecutorStream
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.loop import SchedulerLoop
from pageframe.scheduler.server import make_scheduler
from pageframe.scheduler.servicer import SchedulerServicer

GATEWAY, SCHEDULER, EXECUTOR = "gateway", "scheduler", "executor"


class World:
    """What all services of a simulation share.

    Attributes:
        scenario: What was drawn.
        network: Between them.
        random: Draws what happens while they run.
        may_refuse: Whether plans may still be refused for nothing, and steps fail.
    """

    def __init__(self, scenario: Scenario, network: Network, random_source: random.Random) -> None:
        self.scenario = scenario
        self.network = network
        self.random = random_source
        self.may_refuse = True
        self.num_started = 0

    def clock(self) -> VirtualClock:
        """A clock."""
        return VirtualClock(self.network.loop)

    def refuses(self) -> bool:
        """Whether the next plan is refused for nothing."""
        return self.may_refuse and self.random.random() < self.scenario.refusal_probability


class Service:
    """One service, over as many processes as it takes.

    Args:
        name: Of its processes; they are numbered.
        world: Around it.
        main: Runs in each process until it is killed.
    """

    def __init__(
        self,
        name: str,
        world: World,
        main: Callable[[Process], Coroutine[Any, Any, None]],
    ) -> None:
        self.name = name
        self._world = world
        self._main = main
        self._number = 0
        self.process = Process(name)

    def start(self) -> None:
        """Start a process."""
        self._number += 1
        self.process = Process(f"{self.name}-{self._number}")
        task = self.process.spawn(self._main(self.process))
        task.add_done_callback(self._note_end)

    async def restart(self) -> None:
        """Kill its process, and start another one after a while."""
        network, dying = self._world.network, self.process
        if dying.is_dead:
            return
        network.note(f"{dying.name} is killed")
        network.bury(dying)
        dying.kill()
        await dying.wait_gone()
        await pause(self._world.random.random() * self._world.scenario.restart_s)
        self.start()

    async def stop(self) -> None:
        """Kill its process for good."""
        self._world.network.bury(self.process)
        self.process.kill()
        await self.process.wait_gone()

    def _note_end(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._world.network.fail(f"{self.name} ended with {error!r}")


class ExecutorService(Service):
    """The executor: a real engine and real KV memory over the sim runner."""

    def __init__(self, world: World) -> None:
        super().__init__(EXECUTOR, world, self._run)
        self.engine: WatchedEngine | None = None
        self.steps: VirtualSteps | None = None

    async def _run(self, process: Process) -> None:
        # Those of the process before this one are dead.
        self.engine = self.steps = None
        world, loop = self._world, asyncio.get_running_loop()
        clock = world.clock()
        steps = VirtualSteps(loop, clock)
        servicer = ExecutorServicer(steps, pool_incarnation=clock.now_ns())
        world.network.listen(EXECUTOR, process, servicer)
        await pause(world.random.random() * world.scenario.restart_s)
        engine = self._build(clock)
        await steps.start(lambda: engine)
        servicer.open(engine.describe(world.scenario.settings.model))
        self.engine, self.steps = engine, steps
        await steps.wait_ended()

    def _build(self, clock: VirtualClock) -> WatchedEngine:
        world, settings = self._world, self._world.scenario.settings
        scenario = world.scenario
        runner = FaultyRunner(
            SimConfig(
                vocab_size=MODEL.vocab_size,
                eos_token_ids=(MODEL.eos_token_id,),
                eos_probability=MODEL.eos_probability,
                max_model_len=MAX_MODEL_LEN,
                max_num_rows=settings.max_num_sequences,
                cost=SimCost(step_ns=scenario.step_s * NANOSECONDS_PER_SECOND),
            ),
            clock,
            world.random,
            slow_probability=scenario.slow_probability,
            failure_probability=scenario.failure_probability,
        )
        engine = WatchedEngine(
            runner,
            num_blocks=settings.num_blocks,
            block_size=settings.block_size,
            max_num_sequences=settings.max_num_sequences,
            max_step_tokens=max(settings.token_budget, settings.max_num_sequences),
            max_model_len=MAX_MODEL_LEN,
            trace=NullTraceSink(),
            clock=clock,
            check_every_step=True,
            num_blocks_max=2 * settings.num_blocks,
            num_host_slots=scenario.num_host_slots,
            has_prefix_cache=settings.prefix_cache,
            eviction=load_eviction_policy(settings.eviction_policy),
            session_times=SessionTimes(
                idle_ns=round(settings.session_idle_seconds * NANOSECONDS_PER_SECOND),
                ttl_ns=round(settings.session_ttl_seconds * NANOSECONDS_PER_SECOND),
            ),
        )
        engine.on_violation = world.network.fail
        engine.refuses = world.refuses
        return engine


class SchedulerService(Service):
    """The scheduler: the real core, loop and servicer."""

    def __init__(self, world: World) -> None:
        super().__init__(SCHEDULER, world, self._run)
        self.loop: SchedulerLoop | None = None

    @property
    def is_connected(self) -> bool:
        """Whether it serves, with an executor."""
        return self.loop is not None and self.loop.is_connected and not self.process.is_dead

    async def _run(self, process: Process) -> None:
        world, clock = self._world, self._world.clock()
        settings = world.scenario.settings
        open_channel = world.network.open_channel(process)

        async def open_stream(epoch: int) -> GrpcExecutorStream:
            return await GrpcExecutorStream.open(
                EXECUTOR,
                settings.model,
                epoch,
                quotas=settings.tenant_quotas,
                open_channel=open_channel,
            )

        def build(facts: ReplicaFacts) -> Scheduler:
            return make_scheduler(facts, settings, NullTraceSink(), clock)

        loop = SchedulerLoop(open_stream, make_scheduler=build, clock=clock)
        servicer = SchedulerServicer(loop, clock)
        world.network.listen(SCHEDULER, process, servicer)
        await loop.start()
        self.loop = loop
        await loop.wait_ended()


class GatewayService(Service):
    """A gateway: the real link, service and servicer."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(f"{GATEWAY}{number}", world, self._run)
        self.service: GenerationService | None = None
        self.link: SchedulerLink | None = None

    async def _run(self, process: Process) -> None:
        world, clock = self._world, self._world.clock()
        link = SchedulerLink(
            SCHEDULER,
            gateway_id=process.name,
            lost_after_s=world.scenario.lost_after_s,
            open_channel=world.network.open_channel(process),
            clock=clock,
        )
        authenticator = Authenticator({tenant: Caller(tenant) for tenant in TENANTS})
        service = GenerationService(link, LetterCodecs(), authenticator, clock, NullTraceSink())
        world.network.listen(GATEWAY, process, GatewayServicer(service, authenticator, clock))
        self.service, self.link = service, link
        await link.run()
