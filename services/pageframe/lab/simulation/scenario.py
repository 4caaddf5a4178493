"""What one seed means: a system, requests, and what goes wrong; all drawn before anything runs."""

import enum
import random
from dataclasses import dataclass, field, replace
from typing import Any

from pageframe.client.types import GenerationRequest
from pageframe.config.settings import Settings
from pageframe.core.beams import BeamParams
from pageframe.core.replica import TenantQuota
from pageframe.core.request import Delivery
from pageframe.core.units import ceil_div
from pageframe.lab.simulation.reference import ReferenceModel
from pageframe.scheduler.policies.registry import ADMISSION, ORDER, RECOVERY, VICTIM, Group

MODEL = ReferenceModel(vocab_size=300, eos_token_id=0, eos_probability=0.02)
MAX_MODEL_LEN = 64
TENANTS = ("ants", "bees")
_SHARED_PREFIX = list(range(40, 90))


@enum.unique
class Behaviour(enum.StrEnum):
    """What a client does beside reading."""

    READ = "read"
    CLOSE = "close"  # after some events
    CANCEL = "cancel"  # its task, at some time
    VANISH = "vanish"  # its process, at some time
    STOP_READING = "stop reading"  # for good, after some events
    RECALL = "recall"  # has another connection cancel it by name, at some time


@enum.unique
class Harm(enum.StrEnum):
    """What can happen to the system at some time."""

    KILL_GATEWAY = "kill gateway"
    KILL_SCHEDULER = "kill scheduler"
    KILL_EXECUTOR = "kill executor"
    CUT_GATEWAY = "cut gateway from scheduler"
    CUT_EXECUTOR = "cut scheduler from executor"
    CUT_CLIENTS = "cut clients from gateway"
    RESIZE = "resize"
    RETAIN = "retain"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPlan:
    """One request and what its client does.

    Attributes:
        request: What it asks.
        tenant: Whose it is.
        start_s: When.
        timeout_s: Its deadline after that; None for none.
        behaviour: What it does.
        after_events: For behaviours that wait for events.
        after_s: For behaviours that wait for a time.
        pause_s: Between two reads.
    """

    request: GenerationRequest
    tenant: str
    start_s: float
    timeout_s: float | None = None
    behaviour: Behaviour = Behaviour.READ
    after_events: int = 0
    after_s: float = 0.0
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmPlan:
    """One harm: when, and a number in ``[0, 1)`` that says how much."""

    at_s: float
    harm: Harm
    amount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything that a seed decides.

    Attributes:
        seed: The seed.
        settings: Of all services.
        num_host_slots: Blocks of the host tier.
        num_gateways: Gateways side by side.
        clients: Requests, by start.
        harms: Harms, by time.
        step_s: What a step costs.
        delay_s: Longest delay of a message.
        restart_s: Until a dead process is there again, at most.
        lost_after_s: How long a gateway waits for a lost scheduler.
        slow_probability: Of a step to be slow.
        failure_probability: Of a step to fail.
        refusal_probability: Of a plan to be refused for nothing.
    """

    seed: int
    settings: Settings
    num_host_slots: int
    num_gateways: int
    clients: list[ClientPlan] = field(default_factory=list)
    harms: list[HarmPlan] = field(default_factory=list)
    step_s: float
    delay_s: float
    restart_s: float
    lost_after_s: float
    slow_probability: float
    failure_probability: float
    refusal_probability: float

    @property
    def may_fail(self) -> bool:
        """Whether steps may fail."""
        return self.failure_probability > 0

    def has(self, *harms: Harm) -> bool:
        """Whether any of these is planned."""
        return any(plan.harm in harms for plan in self.harms)


def draw_scenario(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = random.Random(seed)
    clients = _draw_clients(rng)
    block_size = rng.choice((1, 4, 16))
    num_blocks_needed = max(ceil_div(_num_tokens(plan) - 1, block_size) for plan in clients)
    num_blocks = num_blocks_needed + rng.choice((0, 0, 1, 2, num_blocks_needed, 200 // block_size))
    quotas: tuple[TenantQuota, ...] = ()
    if rng.random() < 0.25:
        floor = rng.randint(0, num_blocks - num_blocks_needed)
        ceiling = rng.choice((None, rng.randint(num_blocks_needed, num_blocks)))
        quotas = (
            TenantQuota(tenant=TENANTS[0], floor_blocks=floor),
            TenantQuota(tenant=TENANTS[1], ceiling_blocks=ceiling),
        )
    num_host_slots = rng.choice((0, 0, num_blocks, 2 * num_blocks))
    is_harmless = rng.random() < 0.2
    return Scenario(
        seed=seed,
        settings=_draw_settings(rng, block_size, num_blocks, quotas),
        num_host_slots=num_host_slots,
        num_gateways=rng.choice((1, 1, 2)),
        clients=clients,
        harms=[] if is_harmless else _draw_harms(rng),
        step_s=rng.choice((0.001, 0.005, 0.02)),
        delay_s=rng.choice((0.0, 0.0005, 0.01)),
        restart_s=rng.choice((0.05, 0.5, 3.0)),
        lost_after_s=rng.choice((30.0, 30.0, 0.3)),
        slow_probability=rng.choice((0.0, 0.05)),
        failure_probability=0.0 if is_harmless else rng.choice((0.0, 0.0, 0.0, 0.03)),
        refusal_probability=0.0 if is_harmless else rng.choice((0.0, 0.0, 0.05)),
    )


def calm_scenario(seed: int, plans: list[ClientPlan]) -> Scenario:
    """Some clients' requests by themselves, where there is room and nothing happens."""
    settings: dict[str, object] = {"model": "sim", "block-size": 16, "num-blocks": 200}
    calm = [
        replace(plan, start_s=0.0, timeout_s=None, behaviour=Behaviour.READ, pause_s=0.0)
        for plan in plans
    ]
    return Scenario(
        seed=seed,
        settings=Settings.model_validate(settings | {"prefix-cache": False}),
        num_host_slots=0,
        num_gateways=1,
        clients=calm,
        step_s=0.001,
        delay_s=0.0,
        restart_s=0.0,
        lost_after_s=30.0,
        slow_probability=0.0,
        failure_probability=0.0,
        refusal_probability=0.0,
    )


def _draw_settings(
    rng: random.Random, block_size: int, num_blocks: int, quotas: tuple[TenantQuota, ...]
) -> Settings:
    drawn: dict[str, object] = {
        "model": "sim",
        "block-size": block_size,
        "num-blocks": num_blocks,
        "prefix-cache": rng.random() < 0.7,
        "eviction-policy": rng.choice(("lru", "cost-aware")),
        "session-ttl": rng.choice((0, 0.5, 600)),
        "session-idle": rng.choice((0.1, 60)),
        "tenant-quotas": quotas,
    }
    return Settings.model_validate(drawn | _draw_scheduling(rng))


def _draw_scheduling(rng: random.Random) -> dict[str, object]:
    return {
        "token-budget": rng.choice((2, 8, 32, 512, 512)),
        "prefill-chunk-tokens": rng.choice((0, 0, 3, 16)),
        "target-itl-ms": rng.choice((0, 0, 2, 30)),
        "max-num-sequences": rng.choice((1, 3, 8, 32, 32)),
        "max-queued-requests": rng.choice((4096, 4096, 4096, 4)),
        "tenant-weights": rng.choice(("off", f"{TENANTS[0]}=3,{TENANTS[1]}=1")),
        "priority-ageing": rng.choice((0, 0.05, 60)),
        "order-policy": _draw_name(rng, ORDER),
        "admission-policy": _draw_name(rng, ADMISSION),
        "victim-policy": _draw_name(rng, VICTIM),
        "recovery": _draw_name(rng, RECOVERY),
        "shadow-policy": rng.choice(("off", "off", f"victim={_draw_name(rng, VICTIM)}")),
        "speculation": rng.choice(("off", "ngram")),
        "num-draft-tokens": rng.choice((1, 4)),
        "lookahead": rng.random() < 0.8,
    }


def _draw_name(rng: random.Random, group: Group[Any]) -> str:
    return rng.choice(sorted(group.built_in))


def _draw_clients(rng: random.Random) -> list[ClientPlan]:
    horizon_s = rng.choice((0.0, 0.0, 0.1, 1.0))
    longest_prompt = rng.choice((4, 20, 40))
    longest_output = rng.choice((3, 12, 24))
    mischief = rng.choice((0.0, 0.1, 0.5))
    plans = [
        _draw_client(rng, number, horizon_s, longest_prompt, longest_output, mischief)
        for number in range(rng.randint(3, 12))
    ]
    return sorted(plans, key=lambda plan: plan.start_s)


def _draw_client(
    rng: random.Random,
    number: int,
    horizon_s: float,
    longest_prompt: int,
    longest_output: int,
    mischief: float,
) -> ClientPlan:
    max_tokens = rng.randint(1, longest_output)
    misbehaves = rng.random() < mischief
    return ClientPlan(
        request=_draw_request(rng, number, rng.randint(1, longest_prompt), max_tokens),
        tenant=rng.choice(TENANTS),
        start_s=rng.random() * horizon_s,
        timeout_s=rng.choice((None, None, None, rng.uniform(0.01, 2.0))),
        behaviour=rng.choice(list(Behaviour)) if misbehaves else Behaviour.READ,
        after_events=rng.randint(0, max_tokens),
        after_s=rng.choice((0.0, rng.random() * 0.02, rng.random() * 0.5)),
        pause_s=rng.choice((0.0, 0.0, 0.0, 0.01, 0.2)) if misbehaves else 0.0,
    )


def _draw_request(
    rng: random.Random, number: int, num_prompt_tokens: int, max_tokens: int
) -> GenerationRequest:
    num_shared = rng.choice((0, num_prompt_tokens, rng.randint(0, num_prompt_tokens)))
    own = [rng.randrange(1, MODEL.vocab_size) for _ in range(num_prompt_tokens - num_shared)]
    stop_token_ids = sorted(rng.sample(range(MODEL.vocab_size), rng.choice((0, 0, 20))))
    request = GenerationRequest(
        token_ids=_SHARED_PREFIX[:num_shared] + own,
        max_tokens=max_tokens,
        temperature=rng.choice((0.0, 1.0, 1.0)),
        seed=rng.getrandbits(64),
        stop_token_ids=stop_token_ids,
        request_id=f"r{number}",
        priority=rng.choice((0, 0, 0, 1)),
    )
    kind = rng.random()
    if kind < 0.06:
        num_beams = rng.choice((1, 2, 4))
        beams = BeamParams(num_beams=num_beams, num_return=rng.randint(1, num_beams))
        return replace(request, beam_search=beams, temperature=0.0, stop_token_ids=())
    if kind < 0.12:
        return replace(request, temperature=1.0, num_samples=rng.choice((1, 2)), best_of=3)
    request = replace(
        request,
        delivery=rng.choice(list(Delivery)),
        session_id=rng.choice(("", "", f"chat-{rng.randint(0, 3)}")),
    )
    if kind < 0.2:
        return _resumed(rng, request)
    return replace(
        request,
        num_samples=rng.choice((1, 1, 1, 1, 2, 4)),
        stop=rng.choice(((), (), ("aa", "ek", "qt", "xy", "gm", "ss"))),
        min_tokens=rng.choice((0, 0, rng.randint(0, max_tokens))),
    )


def _resumed(rng: random.Random, request: GenerationRequest) -> GenerationRequest:
    """The request of a client that has a part of its output already, perhaps all of it."""
    output, _ = MODEL.output(
        request.token_ids or (),
        seed=None if request.temperature == 0 else request.seed,
        sample_index=0,
        max_tokens=request.max_tokens or 0,
        stop_token_ids=request.stop_token_ids,
    )
    return replace(request, resume_token_ids=output[: rng.randint(1, len(output))])


def _draw_harms(rng: random.Random) -> list[HarmPlan]:
    horizon_s = rng.choice((0.1, 1.0, 3.0))
    kinds = rng.sample(list(Harm), rng.randint(1, 3))
    plans = [
        HarmPlan(at_s=rng.random() * horizon_s, harm=rng.choice(kinds), amount=rng.random())
        for _ in range(rng.randint(0, 6))
    ]
    return sorted(plans, key=lambda plan: plan.at_s)


def _num_tokens(plan: ClientPlan) -> int:
    request = plan.request
    return len(request.token_ids or ()) + (request.max_tokens or 0)
