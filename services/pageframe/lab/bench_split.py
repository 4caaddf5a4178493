"""What the split into processes costs: the same requests with and without the wire, interleaved.

    round 1:  three processes | one process    round 2:  one process | three processes    …

Both sides are up all the time and idle while the other works, so drift of the machine meets both
alike; the figure is the median of the rounds' ratios. Order alternates, so warm caches do too. What
a side still does behind its own turn, taking memory for next blocks, is over before the next turn.
"""

import asyncio
import contextlib
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from pageframe.client import AsyncPageframeClient, GenerationRequest
from pageframe.core.errors import InternalError
from pageframe.core.request import Delivery
from pageframe.core.sampling import SamplingParams
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.output import OutputDelta
from pageframe.gateway.request import GenerateInput
from pageframe.lab.workload import Load, WorkloadShape, make_workload

Run = Callable[[list[Load]], Awaitable[None]]
CpuSeconds = Callable[[], Mapping[str, float]]
OnRound = Callable[[int, "Round"], None]
Rest = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One pair of measurements, output tokens per second each."""

    split_tokens_per_s: float
    single_tokens_per_s: float

    @property
    def ratio(self) -> float:
        """Speed of three processes over that of one."""
        return self.split_tokens_per_s / self.single_tokens_per_s


@dataclass(slots=True, kw_only=True)
class SplitReport:
    """All rounds, and the processor time that each service took for a token."""

    rounds: list[Round] = field(default_factory=list)
    cpu_us_per_token: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median ratio over the rounds."""
        return statistics.median(entry.ratio for entry in self.rounds)

    def to_json(self) -> dict[str, object]:
        """For machines."""
        return {
            "ratio": self.ratio,
            "rounds": [{**asdict(entry), "ratio": entry.ratio} for entry in self.rounds],
            "cpu_us_per_token": self.cpu_us_per_token,
        }


async def measure_split(
    split: Run,
    single: Run,
    *,
    shape: WorkloadShape,
    vocab_size: int,
    num_rounds: int,
    cpu_seconds: CpuSeconds,
    rest: Rest,
    on_round: OnRound,
) -> SplitReport:
    """Warm both sides up, then run the rounds.

    Args:
        split: Runs requests through three processes.
        single: Runs them in this one.
        shape: Of the requests.
        vocab_size: Token ids to draw from.
        num_rounds: Pairs to measure.
        cpu_seconds: Processor time so far, by service of the three processes.
        rest: Waits until neither side does anything any more.
        on_round: Told of each round.
    """
    report = SplitReport()
    cpu_total: dict[str, float] = {}
    num_tokens = 0
    for index in range(num_rounds + 1):
        loads = make_workload(shape, vocab_size, seed=index)
        num_round_tokens = sum(load.num_output_tokens for load in loads)
        seconds = {}
        sides = {"split": split, "single": single}
        for name in sorted(sides, reverse=index % 2 == 1):
            await rest()
            before = cpu_seconds()
            seconds[name] = await _timed(sides[name], loads)
            if name == "split" and index > 0:
                for service, total in cpu_seconds().items():
                    cpu_total[service] = cpu_total.get(service, 0.0) + total - before[service]
        if index == 0:
            continue
        num_tokens += num_round_tokens
        entry = Round(
            split_tokens_per_s=num_round_tokens / seconds["split"],
            single_tokens_per_s=num_round_tokens / seconds["single"],
        )
        report.rounds.append(entry)
        on_round(index, entry)
    report.cpu_us_per_token = {name: 1e6 * total / num_tokens for name, total in cpu_total.items()}
    return report


def through_client(client: AsyncPageframeClient, delivery: Delivery) -> Run:
    """Requests through a gateway, whose tokens come as ``delivery`` says."""

    async def one(load: Load) -> None:
        result = await client.complete(
            GenerationRequest(
                token_ids=load.prompt_token_ids,
                max_tokens=load.num_output_tokens,
                ignore_eos=True,
                temperature=0.0,
                seed=load.seed,
                delivery=delivery,
            )
        )
        _check_length(len(result.samples[0].token_ids), load)

    return lambda loads: _all(one, loads)


def through_service(service: GenerationService, delivery: Delivery) -> Run:
    """Requests to a generation service of this process, whose tokens come as ``delivery`` says."""

    async def one(load: Load) -> None:
        request = GenerateInput(
            token_ids=load.prompt_token_ids,
            max_tokens=load.num_output_tokens,
            seed=load.seed,
            sampling=SamplingParams(temperature=0.0, ignore_eos=True),
            delivery=delivery,
        )
        num_tokens = 0
        async with contextlib.aclosing(service.generate(request)) as outputs:
            async for output in outputs:
                if isinstance(output, OutputDelta):
                    num_tokens += len(output.token_ids)
        _check_length(num_tokens, load)

    return lambda loads: _all(one, loads)


async def _all(one: Callable[[Load], Awaitable[None]], loads: Sequence[Load]) -> None:
    await asyncio.gather(*(one(load) for load in loads))


async def _timed(run: Run, loads: list[Load]) -> float:
    start_s = time.perf_counter()
    await run(loads)
    return time.perf_counter() - start_s


def _check_length(num_tokens: int, load: Load) -> None:
    if num_tokens != load.num_output_tokens:
        raise InternalError(
            "WRONG_LENGTH",
            f"{num_tokens} tokens came, {load.num_output_tokens} were asked for",
            num_tokens=num_tokens,
            num_tokens_expected=load.num_output_tokens,
        )
