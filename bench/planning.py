"""What a step costs the scheduler while 1,024 sequences run and 10,000 requests wait.

    python -m bench.planning [--steps N] [--output FILE]

In each step so many sequences end, and as many come in from the line: none, one, two, ... up to
128. Everything is real but the model: plans go over the wire's messages to the engine with its KV
memory and back. Timed are the scheduler's parts, as processor time of its thread, so that other
processes do not count:

    plan       `Scheduler.plan`
    message    the plan as bytes
    result     the result read from bytes, `Scheduler.on_result`
    delivery   the token events as bytes

Cost has to grow with what changes. A step in which nobody comes or goes must stay under 1 ms for
plan and message, and every step of up to 16 changes under 3 ms in 99 of 100 cases. Ends do not come
evenly, so steps with more changes than a row is about are left out of its figures; ``all_us`` has
them. A message has the tokens of new sequences in it, which cross the wire once in any case; all
the rest must stay under 10 kB.
"""

import argparse
import json
import platform
import time
from collections import deque
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from pageframe.core.clock import ManualClock
from pageframe.core.request import Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import NullTraceSink
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.sim import SimConfig, SimCost, SimRunner
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.options import SchedulerOptions
from pageframe.v1 import executor_service_pb2 as pb
from pageframe.wire.plan import plan_from_proto, plan_to_proto
from pageframe.wire.request import events_to_proto
from pageframe.wire.step import result_from_proto, result_to_proto

_RESULTS = Path(__file__).with_name("results") / "planning.json"
_NUM_RUNNING = 1024
_NUM_WAITING = 10_000
_NUM_PROMPT_TOKENS = 32
_BLOCK_SIZE = 16
_CHANGES = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_NUM_TENANTS = 50
_PLAN_US_MAX = 1000
_STEP_US_MAX = 3000
_NUM_CHANGES_PROMISED = 16
_MESSAGE_BYTES_MAX = 10_000
_GATEWAY = 1
_PARTS = ("plan", "message", "result", "delivery")


class House:
    """One scheduler and one engine, full.

    Args:
        num_changes: Sequences that end in each step; as many come in.
        num_tenants: Whose requests they are, in turns.
    """

    def __init__(self, num_changes: int, num_tenants: int) -> None:
        # With outputs of this length as many end in each step as shall; drawn apart at the start.
        self.num_output_tokens = _NUM_RUNNING // num_changes if num_changes else 1 << 14
        self.num_changes = num_changes
        self.num_tenants = num_tenants
        self.clock = ManualClock(1)
        max_len = _NUM_PROMPT_TOKENS + (self.num_output_tokens if num_changes else 4096)
        runner = SimRunner(
            SimConfig(max_model_len=1 << 15, max_num_rows=_NUM_RUNNING, cost=SimCost(step_ns=10e6)),
            self.clock,
        )
        budget = _NUM_RUNNING + 129 * _NUM_PROMPT_TOKENS
        self.engine = StepEngine(
            runner,
            num_blocks=_NUM_RUNNING * (max_len // _BLOCK_SIZE + 2),
            block_size=_BLOCK_SIZE,
            max_num_sequences=_NUM_RUNNING,
            max_step_tokens=budget,
            max_model_len=1 << 15,
            trace=NullTraceSink(),
            clock=self.clock,
        )
        self.scheduler = Scheduler(
            self.engine.describe("bench"),
            SchedulerOptions(
                token_budget=budget,
                max_num_running=_NUM_RUNNING,
                max_queued_requests=1 << 20,
                max_queued_tokens=1 << 30,
            ),
            trace=NullTraceSink(),
            clock=self.clock,
        )
        self.plans: deque[bytes] = deque()
        self.num_submitted = 0
        self.rng = np.random.default_rng(3)
        for _ in range(_NUM_RUNNING):
            self.submit(is_first=True)
        while self.scheduler.snapshot().num_running < _NUM_RUNNING:
            self.step()
        for _ in range(_NUM_WAITING):
            self.submit()
        for _ in range(20):
            self.step()

    def submit(self, *, is_first: bool = False) -> None:
        """One more request; the first ones end at different times."""
        self.num_submitted += 1
        num_tokens = self.num_output_tokens
        if is_first and self.num_changes:
            num_tokens = 24 + self.num_submitted * num_tokens // _NUM_RUNNING
        prompt = self.rng.integers(1, 30_000, _NUM_PROMPT_TOKENS).tolist()
        self.scheduler.submit(
            Submission(
                handle=self.num_submitted,
                request_id=str(self.num_submitted),
                prompt_token_ids=prompt,
                sampling=SamplingParams(
                    max_tokens=num_tokens, ignore_eos=True, temperature=1.0, seed=1
                ),
                tenant=f"tenant-{self.num_submitted % self.num_tenants}",
            ),
            _GATEWAY,
        )

    def step(self) -> tuple[list[int], tuple[int, int], int]:
        """One step: nanoseconds of each part, bytes of the plan, and how many ended.

        The bytes are those of announced tokens, and all others.
        """
        mark = time.thread_time_ns
        spent = [0, 0, 0, 0]
        while True:
            start = mark()
            plan = self.scheduler.plan(self.clock.now_ns())
            planned = mark()
            if plan is None:
                break
            self.plans.append(plan_to_proto(plan).SerializeToString())
            spent[0] += planned - start
            spent[1] += mark() - planned
        num_bytes = len(self.plans[0])
        message = pb.StepPlan.FromString(self.plans.popleft())
        data = result_to_proto(self.engine.step(plan_from_proto(message))).SerializeToString()
        start = mark()
        result = result_from_proto(pb.StepResult.FromString(data))
        events = self.scheduler.on_result(result, self.clock.now_ns())
        settled = mark()
        for _, gateway_events in events:
            events_to_proto(gateway_events).SerializeToString()
        spent[2], spent[3] = settled - start, mark() - settled
        num_ended = sum(len(gateway_events.completions) for _, gateway_events in events)
        for announcement in message.announce:
            announcement.ClearField("token_ids")
        num_others = message.ByteSize()
        return spent, (num_bytes - num_others, num_others), num_ended


def measure(num_changes: int, num_steps: int, num_tenants: int) -> dict[str, Any]:
    """Figures of steps with about ``num_changes`` changes, microseconds."""
    house = House(num_changes, num_tenants)
    times, sizes, ended = [], [], []
    for _ in range(num_steps):
        spent, size, num_ended = house.step()
        times.append(spent)
        sizes.append(size)
        ended.append(num_ended)
        for _ in range(num_ended):
            house.submit()
    snapshot = house.scheduler.snapshot()
    everything = np.array(times) / 1e3
    columns = everything[np.array(ended) <= num_changes]
    total = columns.sum(axis=1)
    return {
        "num_steps": len(columns),
        "num_changes_mean": round(float(np.mean(ended)), 1),
        "num_running": snapshot.num_running,
        "num_waiting": snapshot.num_waiting,
        "us_p50": {
            part: round(float(np.median(column)), 1)
            for part, column in zip(_PARTS, columns.T, strict=True)
        },
        "total_us": {f"p{p}": round(float(np.percentile(total, p)), 1) for p in (50, 99)},
        "all_us": {
            f"p{p}": round(float(np.percentile(everything.sum(axis=1), p)), 1) for p in (50, 99)
        },
        "plan_and_message_us_p99": round(float(np.percentile(columns[:, :2].sum(axis=1), 99)), 1),
        "message_bytes": {
            part: {"median": int(np.median(column)), "max": int(max(column))}
            for part, column in zip(("announced_tokens", "others"), np.array(sizes).T, strict=True)
        },
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time by number of changes, part upon part."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    changes = [row["num_changes_mean"] for row in rows]
    parts = [[row["us_p50"][part] for row in rows] for part in _PARTS]
    axes.stackplot(changes, parts, labels=_PARTS, alpha=0.8)
    axes.plot(changes, [row["total_us"]["p99"] for row in rows], "k--", label="all, p99")
    axes.set_xlabel("sequences that end, and come in, per step")
    axes.set_ylabel("processor time per step, µs")
    axes.set_title(f"{_NUM_RUNNING:,} running, {_NUM_WAITING:,} waiting")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Measure, write, draw; 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--changes", type=int, nargs="*", default=_CHANGES)
    parser.add_argument("--output", type=Path, default=_RESULTS)
    args = parser.parse_args()
    rows = []
    for num_changes in args.changes:
        rows.append(measure(num_changes, args.steps, num_tenants=_NUM_TENANTS))
        print(json.dumps(rows[-1]), flush=True)
    promised = [row for row in rows if row["num_changes_mean"] <= _NUM_CHANGES_PROMISED]
    quiet = rows[0]
    holds = {
        "plan_of_decodes_only": quiet["plan_and_message_us_p99"] < _PLAN_US_MAX,
        "step": all(row["total_us"]["p99"] < _STEP_US_MAX for row in promised),
        "message": all(row["message_bytes"]["others"]["max"] < _MESSAGE_BYTES_MAX for row in rows),
    }
    result = {
        "command": "make planning",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "num_tenants": _NUM_TENANTS,
        "num_steps": args.steps,
        "holds": holds,
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(rows, args.output.with_suffix(".png"))
    print(json.dumps(holds))
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
