"""What tracing every KV operation costs a system that serves: two of them, asked in turns.

    python -m bench.tracing_cost [--runner sim|native] [--rounds N] [--json]

Two systems of the same settings run side by side, one with ``--trace off`` and one with ``--trace
all``, whose exporter writes to files. The same streams are served by one, then by the other, then
the other way round, so that whatever the machine does besides hits both alike:

    round 0   off, all     round 1   all, off     round 2   off, all …

Each round gives one ratio of tokens a second and one of processor time, that of all processes
together. Processor time is also told for each process and token, the exporter's up to where it has
caught up, which may be after the last token. With the ``sim`` runner a step waits for as long as
one of a model would take, and all else is real.

Exits with 1 if the median of the ratios is below ``--least``.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.chaos.system import System
from pageframe.client import GenerationRequest
from pageframe.client.aio import AsyncPageframeClient
from pageframe.core.request import Delivery

OFF, ALL = "off", "all"
SERVICES = ("gateway", "scheduler", "executor")
EXPORTER = "telemetry"
_DELIVERIES = {"every-token": Delivery.EVERY_TOKEN, "final": Delivery.FINAL}
_BLOCK_SIZE = 16
_VOCAB_SIZE = 30_000
# The exporter lets records wait for a second; while it does, nothing moves.
_QUIET_S = 1.5
_TURN_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Turn:
    """Streams that one system has served.

    Attributes:
        trace: ``off`` or ``all``.
        tokens_per_s: Of all streams together, from the first request to the last token.
        cpu_s: Processor time by process, in seconds.
        num_tokens: Output tokens.
    """

    trace: str
    tokens_per_s: float
    cpu_s: Mapping[str, float]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all rounds say.

    Attributes:
        ratios: Tokens a second with tracing, as a part of those without, by round.
        ratio: Their median.
        ratio_low: The lower quartile.
        ratio_high: The upper quartile.
        cpu_ratio: Processor time with tracing, as a part of that without; median of the rounds.
        tokens_per_s: Median by ``off`` and ``all``.
        cpu_us_per_token: Processor time of each process, median by ``off`` and ``all``.
    """

    ratios: list[float]
    ratio: float
    ratio_low: float
    ratio_high: float
    cpu_ratio: float
    tokens_per_s: dict[str, float]
    cpu_us_per_token: dict[str, dict[str, float]]


def judge(rounds: Sequence[Mapping[str, Turn]]) -> Verdict:
    """Compare the two turns of each round; a mean over rounds would mix the machine's moods."""
    ratios = [turns[ALL].tokens_per_s / turns[OFF].tokens_per_s for turns in rounds]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Verdict(
        ratios=[round(ratio, 4) for ratio in ratios],
        ratio=round(middle, 4),
        ratio_low=round(low, 4),
        ratio_high=round(high, 4),
        cpu_ratio=round(
            statistics.median(_cpu_s(turns[ALL]) / _cpu_s(turns[OFF]) for turns in rounds), 4
        ),
        tokens_per_s={
            trace: round(statistics.median(turns[trace].tokens_per_s for turns in rounds), 1)
            for trace in (OFF, ALL)
        },
        cpu_us_per_token={
            trace: _cpu_us_per_token([turns[trace] for turns in rounds]) for trace in (OFF, ALL)
        },
    )


def _cpu_s(turn: Turn) -> float:
    return sum(turn.cpu_s.values())


def _cpu_us_per_token(turns: Sequence[Turn]) -> dict[str, float]:
    return {
        name: round(
            statistics.median(1e6 * turn.cpu_s[name] / turn.num_tokens for turn in turns), 2
        )
        for name in turns[0].cpu_s
    }


class Contestant:
    """One of the two systems, and the processes of it that are watched."""

    def __init__(self, system: System, trace: str) -> None:
        self._system = system
        self._trace = trace
        names = (*SERVICES, EXPORTER) if trace == ALL else SERVICES
        self._processes = {name: system.service(name) for name in names}

    async def serve(self, requests: Sequence[GenerationRequest]) -> Turn:
        """Serve all at once, then wait until the exporter has nothing left to do."""
        before = self._cpu_s()
        async with AsyncPageframeClient(self._system.address) as client:
            begin_s = time.monotonic()
            results = await asyncio.gather(
                *(client.complete(request, timeout_s=_TURN_PATIENCE_S) for request in requests)
            )
            elapsed_s = time.monotonic() - begin_s
        num_tokens = sum(len(result.samples[0].token_ids) for result in results)
        assert num_tokens == sum(request.max_tokens or 0 for request in requests), num_tokens
        await self._rest()
        spent = {name: cpu_s - before[name] for name, cpu_s in self._cpu_s().items()}
        return Turn(self._trace, num_tokens / elapsed_s, spent, num_tokens)

    def _cpu_s(self) -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        return {name: time.user + time.system for name, time in times.items()}

    async def _rest(self) -> None:
        """Wait until no process has taken processor time for a while, to what clocks can tell."""
        last: dict[str, float] = {}
        while (now := self._cpu_s()) != last:
            last = now
            await asyncio.sleep(_QUIET_S)


async def measure(
    contestants: Mapping[str, Contestant], options: argparse.Namespace
) -> list[dict[str, Turn]]:
    """All rounds; one more before them is thrown away."""
    rng = random.Random(options.seed)
    rounds: list[dict[str, Turn]] = []
    for number in range(-1, options.rounds):
        requests = make_requests(rng, options)
        order = (OFF, ALL) if number % 2 == 0 else (ALL, OFF)
        turns = {trace: await contestants[trace].serve(requests) for trace in order}
        if number < 0:
            continue
        rounds.append(turns)
        speeds = [f"{turns[trace].tokens_per_s:,.0f}" for trace in (OFF, ALL)]
        print(f"round {number}: {speeds[0]} and {speeds[1]} tokens/s", file=sys.stderr)
    return rounds


def make_requests(rng: random.Random, options: argparse.Namespace) -> list[GenerationRequest]:
    """Prompts that nobody has sent before: what the prefix cache holds is of no use to them."""
    return [
        GenerationRequest(
            token_ids=[rng.randrange(3, _VOCAB_SIZE) for _ in range(options.prompt_tokens)],
            max_tokens=options.output_tokens,
            temperature=0.0,
            ignore_eos=True,
            delivery=_DELIVERIES[options.delivery],
        )
        for _ in range(options.streams)
    ]


def _system_options(options: argparse.Namespace, trace: str) -> tuple[str, ...]:
    num_tokens = options.prompt_tokens + options.output_tokens + 1
    num_blocks = options.streams * -(-num_tokens // _BLOCK_SIZE)
    runner = ("--sim-step", options.sim_step) if options.runner == "sim" else ("--device", "cpu")
    return (
        *("--trace", trace, "--max-num-sequences", str(options.streams)),
        *("--block-size", str(_BLOCK_SIZE), "--num-blocks", str(num_blocks)),
        *runner,
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runner", choices=("sim", "native"), default="sim")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sim-step", default="2ms", help="time of a step of the sim runner")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, help="256, or 32 of a real model")
    parser.add_argument("--delivery", choices=tuple(_DELIVERIES), default="every-token")
    parser.add_argument("--rounds", type=int, default=8, help="2 or more")
    parser.add_argument("--least", type=float, default=0.0, help="lowest median ratio that is well")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="tell all as JSON")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    options.output_tokens = options.output_tokens or (256 if options.runner == "sim" else 32)
    return options


def _report(verdict: Verdict) -> list[str]:
    lines = [
        f"tokens/s with tracing / without: {verdict.ratio:.3f} "
        f"(quartiles {verdict.ratio_low:.3f} to {verdict.ratio_high:.3f}, "
        f"{len(verdict.ratios)} rounds)",
        f"processor time with tracing / without: {verdict.cpu_ratio:.3f}",
    ]
    for trace, cpu in verdict.cpu_us_per_token.items():
        words = ", ".join(f"{name} {microseconds:.1f}" for name, microseconds in cpu.items())
        lines.append(
            f"trace {trace}: {verdict.tokens_per_s[trace]:,.0f} tokens/s; us/token: {words}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it as the command line says; the exit code."""
    options = _parse(arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pf-")))
        contestants: dict[str, Contestant] = {}
        for trace in (OFF, ALL):
            system = System(
                folder / trace, options.model, options.runner, _system_options(options, trace)
            )
            stack.enter_context(system)
            contestants[trace] = Contestant(system, trace)
        verdict = judge(asyncio.run(measure(contestants, options)))
    chosen = {name: value for name, value in vars(options).items() if name != "output"}
    text = json.dumps({"options": chosen, **asdict(verdict)}, indent=2)
    print(text if options.json else "\n".join(_report(verdict)))
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0 if verdict.ratio >= options.least else 1


if __name__ == "__main__":
    sys.exit(main())
