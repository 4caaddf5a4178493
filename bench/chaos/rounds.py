"""Rounds of killing: one process at a time, in the midst of the load."""

import asyncio
import random
import sys
import time
from collections import deque
from dataclasses import replace

from bench.chaos.load import NUM_STREAMS, Load, make_requests
from bench.chaos.system import PATIENCE_S, System, eventually, is_alive
from bench.chaos.verdict import Kill, Verdict
from pageframe.client import GenerationRequest
from pageframe.client.aio import AsyncPageframeClient

# The supervisor gives a service up that dies more than 8 times a minute, and waits longer and
# longer before that.
_NUM_KILLS_PER_MINUTE_MAX = 4


async def chaos(
    system: System,
    *,
    rounds: int,
    seed: int,
    kinds: tuple[str, ...],
    vocab_size: int,
    longest: int,
    pause_s: float = 0.3,
) -> Verdict:
    """Do all rounds, up to `pause_s` seconds apart beyond what is waited for, and come to rest."""
    rng = random.Random(seed)
    verdict = Verdict(seed=seed)
    load = Load(system, make_requests(rng, vocab_size, longest), verdict)
    await load.learn()
    recent: dict[str, deque[float]] = {kind: deque() for kind in kinds}
    left: list[str] = []
    async with load.running():
        for number in range(1, rounds + 1):
            kind = await _choose(rng, left, recent)
            # In the midst of something, but never at the same place.
            await eventually(lambda: load.num_under_way >= NUM_STREAMS // 2)
            await asyncio.sleep(rng.random() * pause_s)
            kill = await _kill(system, kind, load)
            verdict.kills.append(kill)
            print(
                f"{number}/{rounds} {kind}: served again after {kill.serving_after_s:.2f} s,"
                f" loading {kill.loading_s:.2f} s; {verdict.num_requests} requests,"
                f" {len(verdict.wrong)} wrong, failed: {verdict.failed}",
                file=sys.stderr,
            )
    verdict.is_at_rest = await system.settle()
    return verdict


async def _choose(rng: random.Random, left: list[str], recent: dict[str, deque[float]]) -> str:
    """The next to die: all kinds in turn, in random order, none too often for the supervisor."""
    if not left:
        left += rng.sample(sorted(recent), len(recent))
    kind = left.pop()
    times = recent[kind]
    if len(times) >= _NUM_KILLS_PER_MINUTE_MAX:
        await asyncio.sleep(max(0.0, times.popleft() + 60.0 - time.monotonic()))
    times.append(time.monotonic())
    return kind


async def _kill(system: System, kind: str, load: Load) -> Kill:
    victim = await system.wait_service(kind)
    num_under_way = load.num_under_way
    start_s = time.monotonic()
    victim.kill()
    loading_s = 0.0

    async def measure_loading() -> None:
        nonlocal loading_s
        await system.wait_service(kind, unlike=victim.pid)
        if kind == "executor":
            await system.wait_executor()
            loading_s = time.monotonic() - start_s

    loading = asyncio.create_task(measure_loading())
    # A call that the dying process still takes does not count: first it has to be gone.
    await eventually(lambda: not is_alive(victim), every_s=0.001)
    probe = GenerationRequest(token_ids=[3], max_tokens=1, seed=1, priority=100)
    async with AsyncPageframeClient(system.address, retry_for_s=PATIENCE_S) as client:
        await client.complete(replace(probe, request_id=f"probe-{start_s}"))
    serving_after_s = time.monotonic() - start_s
    await loading
    return Kill(
        kind=kind,
        serving_after_s=serving_after_s,
        loading_s=min(loading_s, serving_after_s),
        num_under_way=num_under_way,
    )
