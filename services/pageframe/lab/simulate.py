"""Compares policies: the same arrivals, served in virtual time under each of them."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pageframe.config.settings import OPTION_FIELDS, Settings, load_settings
from pageframe.core.errors import InvalidRequestError
from pageframe.core.journal import Header
from pageframe.lab.simulate_arrivals import Arrival
from pageframe.lab.simulate_cost import DeviceCost
from pageframe.lab.simulate_figures import Figures, Objectives, figures_of
from pageframe.lab.virtual import VirtualConfig, VirtualRun, VirtualServer
from pageframe.scheduler.journal import options_from_json
from pageframe.scheduler.policies.registry import GROUPS
from pageframe.scheduler.server import make_options

MAX_MODEL_LEN = 32_768
"""Longest sequence unless a setting says otherwise."""

OnProgress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Policy:
    """A way to serve.

    Attributes:
        name: For tables.
        settings: What differs from the default, option by option.
    """

    name: str
    settings: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a policy.

    Attributes:
        policy: Which.
        figures: What it was like.
        run: All there is to know.
        wall_s: How long the simulation took, seconds.
    """

    policy: Policy
    figures: Figures
    run: VirtualRun
    wall_s: float


def parse_policy(text: str) -> Policy:
    """``[NAME:]PART,PART,…``; a part is a setting ``KEY=VALUE`` or the name of a policy.

    Keys are those of settings; ``order``, ``admission`` and ``victim`` stand for ``order-policy``
    and so on. ``fcfs,victim=youngest,token-budget=2048`` is a policy.

    Raises:
        InvalidRequestError: POLICY_MALFORMED.
    """
    head, separator, rest = text.partition(":")
    is_named = separator and "=" not in head and "," not in head
    name, body = (head, rest) if is_named else (text or "default", text)
    settings: dict[str, str] = {}
    last = ""
    for part in filter(None, body.split(",")):
        option, value = _setting_of(part)
        if option:
            settings[option] = value
            last = option
        elif last:
            # The value of the setting before has a comma in it.
            settings[last] += f",{part}"
        else:
            raise InvalidRequestError(
                "POLICY_MALFORMED",
                f"{part!r} in policy {text!r} is neither KEY=VALUE nor the name of a policy",
            )
    return Policy(name.strip(), settings)


def configure(policy: Policy, base: Mapping[str, str], cost: DeviceCost) -> VirtualConfig:
    """What is simulated for ``policy``: its settings over those of ``base`` over the defaults.

    Raises:
        InvalidRequestError: SETTING_UNKNOWN or SETTING_MALFORMED.
    """
    settings = load_settings({**base, **policy.settings}, {})
    block_bytes = settings.block_size * cost.kv_bytes_per_token
    return VirtualConfig(
        cost=cost,
        options=make_options(settings),
        num_blocks=_num_blocks(settings, cost),
        block_size=settings.block_size,
        max_model_len=settings.max_model_len or MAX_MODEL_LEN,
        num_host_slots=settings.host_kv_memory_bytes // block_bytes,
        eviction_policy=settings.eviction_policy,
    )


def recorded_config(
    policy: Policy | None, base: Mapping[str, str], header: Header, cost: DeviceCost
) -> tuple[Policy, VirtualConfig]:
    """The system of a journal, as it was or with the settings of ``policy`` instead.

    Args:
        policy: Its settings lie over the recorded ones; None for what was recorded.
        base: Settings over the recorded ones for every policy but that one.
        header: Of the journal.
        cost: What steps cost.

    Raises:
        InvalidRequestError: SETTING_UNKNOWN or SETTING_MALFORMED.
    """
    facts = header.facts
    options = options_from_json(header.options_json)
    eviction_policy = header.memory.eviction_policy or "lru"
    if policy is not None:
        recorded = json.loads(header.settings_json or "{}")
        settings = load_settings({**recorded, **base, **policy.settings}, {})
        options, eviction_policy = make_options(settings), settings.eviction_policy
    config = VirtualConfig(
        cost=cost,
        options=options,
        num_blocks=facts.num_blocks,
        block_size=facts.block_size,
        max_model_len=facts.max_model_len,
        num_host_slots=facts.num_host_blocks,
        eviction_policy=eviction_policy,
    )
    return policy or Policy("recorded", {}), config


def compare(
    configs: Sequence[tuple[Policy, VirtualConfig]],
    arrivals: Sequence[Arrival],
    objectives: Objectives,
    *,
    on_progress: OnProgress | None = None,
) -> list[Outcome]:
    """Serve the same arrivals under each policy.

    Args:
        configs: Policies and what they mean.
        arrivals: In order of time.
        objectives: When a request counts as served well.
        on_progress: Told the policy and the share of its requests that have ended.

    Raises:
        InternalError: SIMULATION_STUCK.
    """
    outcomes = []
    for policy, config in configs:
        start_s = time.perf_counter()
        report = None if on_progress is None else _reporter(on_progress, policy.name)
        run = VirtualServer(config).serve(arrivals, on_progress=report)
        wall_s = time.perf_counter() - start_s
        figures = figures_of(run, objectives)
        outcomes.append(Outcome(policy=policy, figures=figures, run=run, wall_s=wall_s))
        if on_progress is not None:
            on_progress(policy.name, 1.0)
    return outcomes


def _reporter(on_progress: OnProgress, name: str) -> Callable[[float], None]:
    return lambda share: on_progress(name, share)


def _setting_of(part: str) -> tuple[str, str]:
    """Option and value of a part; an empty option if it is none."""
    key, separator, value = (word.strip() for word in part.partition("="))
    if not separator:
        for group in GROUPS.values():
            if key in group.built_in:
                return _option(group.name), key
        return "", ""
    return _option(key), value


def _option(key: str) -> str:
    option = key.replace("_", "-")
    return next((name for name in (option, f"{option}-policy") if name in OPTION_FIELDS), "")


def _num_blocks(settings: Settings, cost: DeviceCost) -> int:
    if settings.num_blocks:
        return settings.num_blocks
    if settings.kv_memory_bytes:
        return settings.kv_memory_bytes // (settings.block_size * cost.kv_bytes_per_token)
    return cost.num_blocks(settings.block_size)
