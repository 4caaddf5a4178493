"""One seed from its start to its end: serve, do harm, come to rest, and look for what is wrong."""

import asyncio
import contextlib
import random
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from pageframe.core.errors import PageframeError
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.gateway.living import Living
from pageframe.gateway.mailbox import Mailbox
from pageframe.lab.simulation.call import pause
from pageframe.lab.simulation.callers import Caller, Expected, expected_outputs
from pageframe.lab.simulation.event_log import EventLog
from pageframe.lab.simulation.leaks import reachable
from pageframe.lab.simulation.network import Network
from pageframe.lab.simulation.scenario import (
    ClientPlan,
    Harm,
    HarmPlan,
    Scenario,
    calm_scenario,
    draw_scenario,
)
from pageframe.lab.simulation.services import (
    EXECUTOR,
    GATEWAY,
    SCHEDULER,
    ExecutorService,
    GatewayService,
    SchedulerService,
    Service,
    World,
)
from pageframe.lab.simulation.virtual_time import StuckError, run_virtually
from pageframe.rpc.auth import Authenticator
from pageframe.scheduler.request import Request
from pageframe.scheduler.sequence import Sequence

_END_S = 2000.0
_NUM_TURNS_MAX = 60_000
_REST_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a seed.

    Attributes:
        seed: The seed.
        digest: Hash of everything that happened.
        violations: What must not happen, and did; empty when all is well.
        num_events: Messages and other events.
        num_requests: Requests.
        virtual_s: How long it lasted in virtual time.
        lines: The log, if asked for.
    """

    seed: int
    digest: str
    violations: list[str]
    num_events: int
    num_requests: int
    virtual_s: float
    lines: list[str] = field(default_factory=list)


def simulate(seed: int, *, keeps_lines: bool = False) -> Outcome:
    """Run one seed."""
    return simulate_scenario(draw_scenario(seed), keeps_lines=keeps_lines)


def simulate_scenario(scenario: Scenario, *, keeps_lines: bool = False) -> Outcome:
    """Run one scenario."""
    log = EventLog(keeps_lines=keeps_lines)
    calm_violations: list[str] = []
    ranked = [plan for plan in scenario.clients if plan.request.is_ranked]
    learnt = iter(_learn(scenario.seed, ranked, calm_violations) if ranked else ())
    expected = [
        next(learnt) if plan.request.is_ranked else expected_outputs(plan)
        for plan in scenario.clients
    ]
    simulation = _Simulation(scenario, log, expected)
    violations = simulation.violations
    violations += calm_violations
    with _watching_logs(scenario, violations, log):
        try:
            _, left = run_virtually(simulation.run, end_s=_END_S, num_turns_max=_NUM_TURNS_MAX)
            violations += left
        except StuckError as error:
            violations += [f"stuck: {error}", *simulation.describe_waiting()]
    return Outcome(
        seed=scenario.seed,
        digest=log.digest,
        violations=violations,
        num_events=log.num_events,
        num_requests=len(scenario.clients),
        virtual_s=simulation.now_s,
        lines=log.lines,
    )


def _learn(
    seed: int, plans: list[ClientPlan], violations: list[str]
) -> list[list[Expected] | None]:
    """The outputs of requests whose samples compete: those that they have in a calm world."""
    log = EventLog()
    simulation = _Simulation(calm_scenario(seed, plans), log, [None] * len(plans))
    with _watching_logs(simulation.scenario, simulation.violations, log):
        try:
            run_virtually(simulation.run, end_s=_END_S, num_turns_max=_NUM_TURNS_MAX)
        except StuckError as error:
            simulation.violations.append(f"stuck: {error}")
    violations += [f"in a calm world: {line}" for line in simulation.violations]
    if simulation.violations:
        return [None] * len(plans)
    return [caller.heard for caller in simulation.callers]


class _Simulation:
    """One world. ``callers`` are its clients, in the order of ``scenario.clients``."""

    def __init__(
        self, scenario: Scenario, log: EventLog, expected: list[list[Expected] | None]
    ) -> None:
        self.scenario = scenario
        self._log = log
        self._expected = expected
        self.violations: list[str] = []
        self.callers: list[Caller] = []
        self._network: Network | None = None

    @property
    def now_s(self) -> float:
        return self._network.loop.time() if self._network is not None else 0.0

    def describe_waiting(self) -> list[str]:
        """Who has not ended."""
        return [
            f"{caller.process.name} waits ({caller.plan.behaviour})"
            for caller in self.callers
            if not (caller.has_ended or caller.process.is_dead)
        ][:3]

    async def run(self) -> None:
        scenario, loop = self.scenario, asyncio.get_running_loop()
        rng = random.Random(f"{scenario.seed} while it runs")
        network = Network(loop, rng, self._log, delay_s=scenario.delay_s)
        network.violations = self.violations
        self._network = network
        world = World(scenario, network, rng)
        executor, scheduler = ExecutorService(world), SchedulerService(world)
        gateways = [GatewayService(world, number) for number in range(scenario.num_gateways)]
        services: list[Service] = [executor, scheduler, *gateways]
        for service in rng.sample(services, len(services)):
            service.start()
        self.callers = [
            Caller(plan, scenario, network, expected)
            for plan, expected in zip(scenario.clients, self._expected, strict=True)
        ]
        calling = [asyncio.create_task(caller.run()) for caller in self.callers]
        harming = [
            asyncio.create_task(_do_harm(plan, world, executor, scheduler, gateways))
            for plan in scenario.harms
        ]
        await asyncio.gather(*calling, *harming)
        world.may_refuse = False
        await self._come_to_rest(executor, scheduler, gateways)
        self._check_nothing_left(executor, scheduler, gateways)
        for service in services:
            await service.stop()
        for caller in self.callers:
            await caller.process.wait_gone()
        # What was sent on the way out arrives nowhere, in a moment.
        await pause(1.0)

    async def _come_to_rest(
        self,
        executor: ExecutorService,
        scheduler: SchedulerService,
        gateways: list[GatewayService],
    ) -> None:
        deadline_s = self.now_s + _REST_S
        while not _is_at_rest(executor, scheduler, gateways):
            if self.now_s > deadline_s:
                self.violations.append(f"not at rest {_REST_S:g} s after the last request")
                return
            await pause(0.1)

    def _check_nothing_left(
        self,
        executor: ExecutorService,
        scheduler: SchedulerService,
        gateways: list[GatewayService],
    ) -> None:
        if scheduler.loop is not None:
            left = reachable([scheduler.loop.scheduler], (Sequence, Request))
            self.violations += [f"the scheduler still has {found.path}" for found in left]
        for gateway in gateways:
            left = reachable([gateway.service, gateway.link], (Living, Mailbox))
            self.violations += [f"{gateway.name} still has {found.path}" for found in left]
        engine = executor.engine
        if engine is not None:
            account = engine.account()
            if account.free + account.cached + account.pinned != account.total:
                self.violations.append(f"blocks are missing: {account}")
            engine.check_integrity()


def _is_at_rest(
    executor: ExecutorService, scheduler: SchedulerService, gateways: list[GatewayService]
) -> bool:
    return (
        executor.engine is not None
        and executor.engine.is_idle
        and scheduler.loop is not None
        and scheduler.is_connected
        and scheduler.loop.scheduler.is_idle
        and all(gateway.link is not None and not gateway.link.num_living for gateway in gateways)
    )


async def _do_harm(
    plan: HarmPlan,
    world: World,
    executor: ExecutorService,
    scheduler: SchedulerService,
    gateways: list[GatewayService],
) -> None:
    await pause(plan.at_s)
    network = world.network
    network.note(f"harm: {plan.harm}")
    match plan.harm:
        case Harm.KILL_GATEWAY:
            await world.random.choice(gateways).restart()
        case Harm.KILL_SCHEDULER:
            await scheduler.restart()
        case Harm.KILL_EXECUTOR:
            await executor.restart()
        case Harm.CUT_GATEWAY:
            network.sever(GATEWAY, SCHEDULER)
        case Harm.CUT_EXECUTOR:
            network.sever(SCHEDULER, EXECUTOR)
        case Harm.CUT_CLIENTS:
            network.sever("client", GATEWAY)
        case Harm.RESIZE | Harm.RETAIN:
            await _operate(plan, world, executor)


async def _operate(plan: HarmPlan, world: World, executor: ExecutorService) -> None:
    """Do what an operator may do to KV memory, if it is there."""
    engine, steps, scenario = executor.engine, executor.steps, world.scenario
    if engine is None or steps is None or executor.process.is_dead:
        return
    desk, clock = engine.desk, world.clock()

    def act() -> None:
        with contextlib.suppress(PageframeError):
            if plan.harm is Harm.RESIZE:
                # Below the floors of the settings no scheduler could ever come back.
                settings = scenario.settings
                num_blocks_min = sum(quota.floor_blocks for quota in settings.tenant_quotas)
                num_blocks = 1 + round(plan.amount * 2 * settings.num_blocks)
                desk.resize(max(num_blocks, num_blocks_min))
                return
            client = world.random.choice(scenario.clients)
            desk.retain(
                tenant=client.tenant,
                cache_salt=Authenticator({}).cache_salt(client.tenant),
                name=f"handle-{plan.at_s}",
                token_ids=list(client.request.token_ids or ()),
                ttl_ns=round(plan.amount * NANOSECONDS_PER_SECOND) + 1,
                now_ns=clock.now_ns(),
            )

    # Its process may die before it comes to that.
    await asyncio.wait((executor.process.spawn(steps.call(act)),))


@contextlib.contextmanager
def _watching_logs(scenario: Scenario, violations: list[str], log: EventLog) -> Iterator[None]:
    """Count lines that speak of a failure as violations; drop all others."""

    def watch(_logger: Any, level: str, entry: MutableMapping[str, Any]) -> Any:
        event = str(entry.get("event"))
        if level in ("error", "critical") and not (scenario.may_fail and event == "step_failed"):
            violations.append(f"logged: {entry!r}"[:2000])
        if log.keeps_lines:
            log.lines.append(f"             log: {event} {dict(entry)}"[:300])
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[structlog.processors.format_exc_info, watch])
    try:
        yield
    finally:
        structlog.configure(**before)
