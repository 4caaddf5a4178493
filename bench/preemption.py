"""What preempting costs when twice as many blocks are wanted as there are: ``make preemption``.

The real scheduler, engine and KV memory in virtual time; a step costs what ``H200_8B`` says (an 8B
model in bf16 on an H200, 128 KiB of keys and values a token), and a block that goes to the host or
comes from there 38 us (2 MiB at 55 GB/s, PCIe 5). Copies are not overlapped with the model.

Requests have all come before the first step. ``roomy`` has blocks for all that may run at once; the
tight pool has half of what it came to hold. With fewer blocks fewer run, and a smaller batch has a
lower throughput whoever is preempted. So the tight pool is held against ``as many``: a roomy pool
in which just so many run as ran in the tight one on average, the same work without a preemption.
It should come to 85 % of that.

    python -m bench.preemption [--seed S]
"""

import argparse
import json
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np

from pageframe.core.clock import ManualClock
from pageframe.core.plan import StepPlan
from pageframe.core.request import Delivery, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import AttributeValue, NullTraceSink, TraceSink
from pageframe.executor.engine import StepEngine
from pageframe.lab.simulate_cost import H200_8B, DeviceCost
from pageframe.lab.virtual_runner import VirtualRunner
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.options import SchedulerOptions
from pageframe.telemetry import spans

_RESULTS = Path(__file__).resolve().parent / "results"
_HOST_BYTES_PER_NS = 55.0
_BLOCK_SIZE = 16
_MAX_MODEL_LEN = 8192
_TOKEN_BUDGET = 2048
_NS = 1e9
_GATEWAY = 1
_TARGET = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Requests with lengths that are uniform between bounds, both included."""

    name: str
    num_requests: int
    num_prompt_tokens: tuple[int, int]
    num_output_tokens: tuple[int, int]
    num_running: int

    def lengths(self, seed: int) -> list[tuple[int, int]]:
        """Prompt and output tokens of each request."""
        rng = np.random.default_rng(seed)
        low, high = zip(self.num_prompt_tokens, self.num_output_tokens, strict=True)
        pairs = rng.integers(low, np.add(high, 1), size=(self.num_requests, 2))
        return [(int(prompt), int(output)) for prompt, output in pairs]


SCENARIOS = (
    Scenario(
        name="many short",
        num_requests=192,
        num_prompt_tokens=(200, 1000),
        num_output_tokens=(200, 1000),
        num_running=64,
    ),
    Scenario(
        name="few long",
        num_requests=24,
        num_prompt_tokens=(500, 1000),
        num_output_tokens=(3000, 5000),
        num_running=12,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One system under test.

    ``num_host_blocks`` of 0 is no host tier.
    """

    name: str
    num_blocks: int
    num_running: int
    num_host_blocks: int = 0
    policies: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of it; times are virtual.

    ``lost_ms`` is what getting back cost in all; ``error`` is by how much an estimate of that was
    off, the median, in parts of what it came to.
    """

    name: str
    num_blocks: int
    num_host_blocks: int
    num_running: int
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    num_steps: int = 0
    mean_running: float = 0.0
    num_blocks_peak: int = 0
    num_preemptions: int = 0
    recoveries: dict[str, int] = field(default_factory=dict)
    lost_ms: float = 0.0
    error: float | None = None


@dataclass(slots=True)
class PreemptSpans:
    """Keeps what preempt spans say; a scheduler records nothing but spans."""

    told: list[Mapping[str, AttributeValue]] = field(default_factory=list)

    def span(self, name: str, *, attributes: Mapping[str, AttributeValue], **_: object) -> None:
        if name == spans.PREEMPT:
            self.told.append(attributes)


def run(setup: Setup, requests: list[tuple[int, int]]) -> Outcome:
    """Serve all requests; every one gets all its tokens."""
    clock, sink = ManualClock(1), PreemptSpans()
    block_bytes = _BLOCK_SIZE * H200_8B.kv_bytes_per_token
    cost: DeviceCost = replace(H200_8B, move_ns=block_bytes / _HOST_BYTES_PER_NS)
    runner = VirtualRunner(cost, clock, max_model_len=_MAX_MODEL_LEN, on_execute=lambda _: None)
    engine = StepEngine(
        runner,
        num_blocks=setup.num_blocks,
        block_size=_BLOCK_SIZE,
        max_num_sequences=setup.num_running,
        max_step_tokens=_TOKEN_BUDGET,
        max_model_len=_MAX_MODEL_LEN,
        num_host_slots=setup.num_host_blocks,
        trace=NullTraceSink(),
        clock=clock,
    )
    scheduler = Scheduler(
        engine.describe("bench"),
        SchedulerOptions(
            token_budget=_TOKEN_BUDGET,
            max_num_running=setup.num_running,
            max_queued_requests=1 << 40,
            max_queued_tokens=1 << 40,
            policies=setup.policies,
        ),
        trace=cast(TraceSink, sink),
        clock=clock,
    )
    _submit(scheduler, requests)
    outcome = Outcome(
        name=setup.name,
        num_blocks=setup.num_blocks,
        num_host_blocks=setup.num_host_blocks,
        num_running=setup.num_running,
    )
    _drive(scheduler, engine, clock, outcome)
    num_tokens = sum(output for _, output in requests)
    outcome.seconds = clock.now_ns() / _NS
    outcome.tokens_per_s = num_tokens / outcome.seconds
    _judge(outcome, sink)
    return outcome


def _submit(scheduler: Scheduler, requests: list[tuple[int, int]]) -> None:
    for index, (num_prompt_tokens, num_output_tokens) in enumerate(requests):
        scheduler.submit(
            Submission(
                handle=index + 1,
                request_id=str(index),
                # A first token of its own, so that nobody shares anything.
                prompt_token_ids=[index + 1] * num_prompt_tokens,
                sampling=SamplingParams(max_tokens=num_output_tokens, ignore_eos=True, seed=1),
                delivery=Delivery.FINAL,
                trace_id=bytes(15) + b"\1",
                span_id=(index + 1).to_bytes(8, "big"),
            ),
            _GATEWAY,
        )


def _drive(scheduler: Scheduler, engine: StepEngine, clock: ManualClock, outcome: Outcome) -> None:
    plans: deque[StepPlan] = deque()
    num_sampled = 0
    while not scheduler.is_idle:
        while (plan := scheduler.plan(clock.now_ns())) is not None:
            plans.append(plan)
        assert plans, f"nothing is planned: {scheduler.snapshot().num_running} run"
        result = engine.step(plans.popleft())
        outcome.num_steps += 1
        num_sampled += len(result.sampled_ids)
        outcome.num_blocks_peak = max(outcome.num_blocks_peak, result.account.held)
        outcome.num_preemptions += len(result.preempted_ids)
        for recovery in result.preempted_recoveries:
            name = recovery.name.lower()
            outcome.recoveries[name] = outcome.recoveries.get(name, 0) + 1
        for _, message in scheduler.on_result(result, clock.now_ns()):
            assert not any(completion.error_reason for completion in message.completions)
    outcome.mean_running = num_sampled / outcome.num_steps


def _judge(outcome: Outcome, sink: PreemptSpans) -> None:
    errors = []
    for told in sink.told:
        actual_ms = cast(float, told[spans.PREEMPT_ACTUAL_MS])
        estimate_ms = cast(float, told[spans.PREEMPT_ESTIMATE_MS])
        outcome.lost_ms += actual_ms
        if told[spans.PREEMPT_IS_BACK] and actual_ms:
            errors.append(abs(actual_ms - estimate_ms) / actual_ms)
    assert len(sink.told) == outcome.num_preemptions
    outcome.error = statistics.median(errors) if errors else None


def study(scenario: Scenario, seed: int) -> list[Outcome]:
    """Roomy, a tight pool under all policies, and as many as ran there without a preemption."""
    requests = scenario.lengths(seed)
    num_blocks_all = scenario.num_running * _MAX_MODEL_LEN // _BLOCK_SIZE
    roomy = run(
        Setup(name="roomy", num_blocks=num_blocks_all, num_running=scenario.num_running), requests
    )
    combinations = [("youngest", "recompute", 0)]
    combinations += [("cheapest", recovery, 0) for recovery in ("recompute", "tail", "auto")]
    for recovery in ("recompute", "swap", "tail", "auto"):
        combinations.append(("cheapest", recovery, roomy.num_blocks_peak))
    tight = [
        run(
            Setup(
                name=f"{victim}, {recovery}",
                num_blocks=roomy.num_blocks_peak // 2,
                num_running=scenario.num_running,
                num_host_blocks=num_host_blocks,
                policies={"victim": victim, "recovery": recovery},
            ),
            requests,
        )
        for victim, recovery, num_host_blocks in combinations
    ]
    target = max(outcome.mean_running for outcome in tight)
    as_many = _as_many(requests, num_blocks_all, round(target))
    # Fewer run in the beginning and at the end.
    num_running = round(target * as_many.num_running / as_many.mean_running)
    as_many = _as_many(requests, num_blocks_all, num_running)
    return [roomy, as_many, *tight]


def _as_many(requests: list[tuple[int, int]], num_blocks: int, num_running: int) -> Outcome:
    return run(Setup(name="as many", num_blocks=num_blocks, num_running=num_running), requests)


def table(outcomes: list[Outcome]) -> str:
    """Markdown."""
    as_many = outcomes[1]
    lines = [
        "| run | host blocks | running | tokens/s | of `as many` | preemptions | time lost, ms "
        "| estimate off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        ways = ", ".join(f"{name} {count}" for name, count in sorted(outcome.recoveries.items()))
        error = "" if outcome.error is None else f"{outcome.error:.0%}"
        lines.append(
            f"| {outcome.name} | {outcome.num_host_blocks or ''} | {outcome.mean_running:.1f} "
            f"| {outcome.tokens_per_s:,.0f} | {outcome.tokens_per_s / as_many.tokens_per_s:.1%} "
            f"| {outcome.num_preemptions}{f' ({ways})' if ways else ''} "
            f"| {outcome.lost_ms:,.0f} | {error} |"
        )
    return "\n".join(lines)


def describe(scenario: Scenario, outcomes: list[Outcome], seed: int) -> str:
    """One scenario in Markdown."""
    prompts, outputs = scenario.num_prompt_tokens, scenario.num_output_tokens
    return (
        f"## {scenario.name.capitalize()}\n\n"
        f"{scenario.num_requests} requests, seed {seed}; prompts of {prompts[0]:,} to "
        f"{prompts[1]:,} tokens, outputs of {outputs[0]:,} to {outputs[1]:,}; at most "
        f"{scenario.num_running} run; {outcomes[-1].num_blocks:,} blocks of {_BLOCK_SIZE} tokens "
        f"in the tight pool.\n\n{table(outcomes)}\n"
    )


def main() -> int:
    """Measure, write, judge; 1 when a tight pool under the default policies falls short."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=_RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    parts, document, has_missed = [], {}, False
    for scenario in SCENARIOS:
        outcomes = study(scenario, arguments.seed)
        parts.append(describe(scenario, outcomes, arguments.seed))
        print(parts[-1], flush=True)
        document[scenario.name] = [asdict(outcome) for outcome in outcomes]
        least = _TARGET * outcomes[1].tokens_per_s
        defaults = [outcome for outcome in outcomes if outcome.name == "cheapest, auto"]
        has_missed |= any(outcome.tokens_per_s < least for outcome in defaults)
    arguments.output.mkdir(exist_ok=True)
    head = "# Preemption\n\nMade by `make preemption`; `bench/preemption.py` says what was run.\n\n"
    (arguments.output / "preemption.md").write_text(head + "\n".join(parts), encoding="utf-8")
    (arguments.output / "preemption.json").write_text(
        json.dumps(document, indent=1) + "\n", encoding="utf-8"
    )
    return 1 if has_missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
