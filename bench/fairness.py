"""What a tenant that floods does to one that sends little: the real scheduler in virtual time.

Tenant ``light`` sends a thin Poisson stream; tenant ``flood`` sends nothing, what its weight grants
it, or ten times what the whole machine can serve. Its weight is 3 and that of light 1; light sends
a tenth of what the machine can serve. The same requests of ``light`` come at the same times in all
runs, so their times to the first token can be compared.

    run              flood sends                  order
    alone            nothing                      fair
    at its share     three quarters of what fits  fair
    flood            ten times what fits          fair
    nobody waits     what was served in ``flood``  any
    first come       ten times what fits          fcfs

``nobody waits`` is the least that any order could come to: the same requests of flood, handed in
just before each was let in, on a machine with slots and blocks for all. The steps are as full as in
``flood`` and nothing is ever short, so by how much ``flood`` exceeds it is what waiting costs; the
rest of a rise is the length of steps.

Then both flood, with weights 3 and 1, and the tokens that each gets are compared with the weights.
Time is virtual: an 8B model on an H200, see ``lab/simulate_cost``. The baseline of the promise is
``at its share``: light must not be able to tell a flood from a neighbour who keeps to its part.
Time to the first token is told in steps as well, and by the causes of waiting that the scheduler
records. A full machine takes longer steps, and no order of requests changes that: where steps may
be several times as long as usual, because outputs are long and many run at once or because the
token budget is large, the promise is not made.
"""

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageframe.lab.simulate_arrivals import Arrival
from pageframe.lab.simulate_cost import H200_8B
from pageframe.lab.virtual import VirtualConfig, VirtualRun, VirtualServer
from pageframe.scheduler.options import SchedulerOptions

_RESULTS = Path(__file__).with_name("results") / "fairness.json"
_RISE_MAX = 0.20
_SHARE_ERROR_MAX = 0.05
_WEIGHTS = {"flood": 3.0, "light": 1.0}
_PART_OF_FLOOD = 0.75
_NUM_QUEUED_MAX = 256
_NUM_CAPACITY_REQUESTS = 600
# Steps from a request's arrival to its first token where it waits for nothing.
_NUM_FIRST_TOKEN_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The replica under test.

    Attributes:
        name: For tables.
        max_num_running: Slots.
        token_budget: Most tokens of a step.
        num_blocks: Blocks of 16 tokens.
    """

    name: str
    max_num_running: int
    token_budget: int
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A Poisson stream of requests with log-normal lengths; tokens are means."""

    tenant: str
    rate_per_s: float
    num_prompt_tokens: int
    num_output_tokens: int

    def arrivals(self, duration_s: float, seed: int) -> list[Arrival]:
        """Requests within ``duration_s``."""
        rng = np.random.default_rng(seed)
        num_requests = int(self.rate_per_s * duration_s)
        times = np.sort(rng.uniform(0, duration_s, num_requests))
        prompts = _lengths(rng, self.num_prompt_tokens, num_requests)
        outputs = _lengths(rng, self.num_output_tokens, num_requests)
        return [
            Arrival(
                arrival_s=float(times[i]),
                num_prompt_tokens=int(prompts[i]),
                num_output_tokens=int(outputs[i]),
                tenant=self.tenant,
            )
            for i in range(num_requests)
        ]


def _lengths(rng: np.random.Generator, mean: int, num: int) -> NDArray[np.int64]:
    sigma = 0.4
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, num)
    return np.clip(drawn, 1, 4 * mean).astype(np.int64)


SLOTS = Machine(name="slots are short", max_num_running=128, token_budget=512, num_blocks=52_000)
BLOCKS = Machine(name="blocks are short", max_num_running=256, token_budget=512, num_blocks=3_000)
COARSE = Machine(name="steps are long", max_num_running=256, token_budget=1024, num_blocks=52_000)


# Machine, tokens of the flood's prompts and outputs, and whether the promise is made for it.
_STUDIES = (
    (SLOTS, (400, 200), True),
    (BLOCKS, (400, 200), True),
    (SLOTS, (200, 2000), False),
    (COARSE, (400, 200), False),
)


def serve(
    machine: Machine,
    arrivals: Iterable[Arrival],
    order: str,
    weights: dict[str, float],
    *,
    max_queued_requests: int = _NUM_QUEUED_MAX,
) -> VirtualRun:
    """One run."""
    options = SchedulerOptions(
        token_budget=machine.token_budget,
        max_num_running=machine.max_num_running,
        policies={"order": order},
        tenant_weights=weights,
        max_queued_requests=max_queued_requests,
    )
    server = VirtualServer(
        VirtualConfig(cost=H200_8B, options=options, num_blocks=machine.num_blocks)
    )
    return server.serve(sorted(arrivals, key=lambda arrival: arrival.arrival_s))


def first_tokens(run: VirtualRun, tenant: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Milliseconds, and steps that ended, until the first token of each request of ``tenant``."""
    ids, times = run.token_times()
    ends = np.frombuffer(run.steps.end_ns, dtype=np.int64)
    _, first = np.unique(ids, return_index=True)
    waits_ns, num_steps = [], []
    for index in first:
        arrival = run.arrivals[run.request_of[int(ids[index])]]
        if arrival.tenant == tenant:
            span_ns = np.array([arrival.arrival_s * 1e9, times[index]])
            waits_ns.append(span_ns[1] - span_ns[0])
            before, after = np.searchsorted(ends, span_ns, side="right")
            num_steps.append(after - before)
    return np.array(waits_ns) / 1e6, np.array(num_steps)


def waits_ms(run: VirtualRun, tenant: str) -> dict[str, float]:
    """Mean milliseconds that the requests of ``tenant`` waited, by cause; none was preempted."""
    waited_ns: Counter[str] = Counter()
    num_requests = 0
    for place, completion in run.completions:
        if run.arrivals[place].tenant == tenant:
            num_requests += 1
            for cause, stall_ns in completion.stall_ns.items():
                waited_ns[cause.name.lower()] += stall_ns
    return {name: round(ns / 1e6 / max(1, num_requests), 2) for name, ns in waited_ns.items()}


def as_let_in(run: VirtualRun, tenant: str) -> list[Arrival]:
    """The requests of ``tenant`` that ``run`` served, each coming just before it was let in."""
    ids, times = run.token_times()
    ends = np.frombuffer(run.steps.end_ns, dtype=np.int64)
    _, first = np.unique(ids, return_index=True)
    served = []
    for index in first:
        arrival = run.arrivals[run.request_of[int(ids[index])]]
        if arrival.tenant == tenant:
            step = int(np.searchsorted(ends, times[index])) - _NUM_FIRST_TOKEN_STEPS
            served.append(replace(arrival, arrival_s=float(ends[max(0, step)]) / 1e9))
    return served


def tokens_by_tenant(run: VirtualRun, start_s: float, end_s: float) -> dict[str, float]:
    """Prompt and output tokens of each tenant within a span of time.

    A prompt counts where its first token comes.
    """
    ids, times = run.token_times()
    inside = (times >= start_s * 1e9) & (times < end_s * 1e9)
    _, first = np.unique(ids, return_index=True)
    served: dict[str, float] = {}
    for sequence_id, num_tokens in zip(*np.unique(ids[inside], return_counts=True), strict=True):
        arrival = run.arrivals[run.request_of[int(sequence_id)]]
        served[arrival.tenant] = served.get(arrival.tenant, 0) + float(num_tokens)
    for index in first[inside[first]]:
        arrival = run.arrivals[run.request_of[int(ids[index])]]
        served[arrival.tenant] += arrival.num_prompt_tokens
    return served


def capacity_per_s(machine: Machine, stream: Stream) -> float:
    """Requests of ``stream`` a second that the machine can serve: all are there from the start."""
    arrivals = [
        Arrival(
            arrival_s=0.0,
            num_prompt_tokens=it.num_prompt_tokens,
            num_output_tokens=it.num_output_tokens,
            tenant=it.tenant,
        )
        for it in stream.arrivals(1.0, seed=5)
    ]
    run = serve(machine, arrivals, "fair", {}, max_queued_requests=len(arrivals))
    ends = np.sort(np.array(run.end_ns)) / 1e9
    # The middle part, when the machine is neither filling up nor running empty.
    low, high = len(ends) // 4, len(ends) * 3 // 4
    return float((high - low) / (ends[high] - ends[low]))


def isolate(machine: Machine, duration_s: float, shape: tuple[int, int]) -> dict[str, Any]:
    """``light`` beside every kind of neighbour."""
    flood = Stream(
        tenant="flood",
        rate_per_s=_NUM_CAPACITY_REQUESTS,
        num_prompt_tokens=shape[0],
        num_output_tokens=shape[1],
    )
    capacity = capacity_per_s(machine, flood)
    light = Stream(
        tenant="light", rate_per_s=capacity / 10, num_prompt_tokens=200, num_output_tokens=100
    )
    ours = light.arrivals(duration_s, seed=1)
    runs = {
        "alone": (0.0, "fair"),
        "at its share": (_PART_OF_FLOOD * capacity, "fair"),
        "flood": (10 * capacity, "fair"),
        "first come": (10 * capacity, "fcfs"),
    }
    rows: dict[str, Any] = {}
    theirs_in_flood: list[Arrival] = []
    for name, (rate, order) in runs.items():
        theirs = replace(flood, rate_per_s=rate).arrivals(duration_s, seed=2)
        start_s = time.monotonic()
        run = serve(machine, [*ours, *theirs], order, _WEIGHTS)
        rows[name] = _row(run, time.monotonic() - start_s)
        print(machine.name, shape, name, rows[name], flush=True)
        if name == "flood":
            theirs_in_flood = as_let_in(run, "flood")
    start_s = time.monotonic()
    wide = replace(
        machine, max_num_running=2 * machine.max_num_running, num_blocks=10 * machine.num_blocks
    )
    run = serve(wide, [*ours, *theirs_in_flood], "fair", _WEIGHTS)
    rows["nobody waits"] = _row(run, time.monotonic() - start_s)
    print(machine.name, shape, "nobody waits", rows["nobody waits"], flush=True)
    p99_ms = {name: row["first_token_ms"]["p99"] for name, row in rows.items()}
    p99_steps = {name: row["first_token_steps"]["p99"] for name, row in rows.items()}
    rise = p99_ms["flood"] / p99_ms["at its share"] - 1
    return {
        "flood_tokens": {"prompt": shape[0], "output": shape[1]},
        "capacity_requests_per_s": round(capacity, 2),
        "light_requests_per_s": round(capacity / 10, 2),
        "runs": rows,
        "rise_of_p99_over_share": round(rise, 4),
        "rise_of_p99_over_alone": round(p99_ms["flood"] / p99_ms["alone"] - 1, 4),
        "rise_of_p99_by_waiting": round(p99_ms["flood"] / p99_ms["nobody waits"] - 1, 4),
        "rise_of_p99_in_steps": p99_steps["flood"] - p99_steps["at its share"],
        "holds": bool(rise < _RISE_MAX),
        "machine": asdict(machine),
    }


def _row(run: VirtualRun, wall_s: float) -> dict[str, Any]:
    """What is kept of one run."""
    first_token_ms, num_steps = first_tokens(run, "light")
    return {
        "num_requests": len(first_token_ms),
        "num_refused": sum(run.refused.values()),
        "num_preemptions": run.num_preemptions,
        "first_token_ms": _percentiles(first_token_ms),
        "first_token_steps": _percentiles(num_steps),
        "waits_ms_mean": waits_ms(run, "light"),
        "step_ms_mean": round(float(np.diff(np.array(run.steps.end_ns)).mean()) / 1e6, 2),
        "running_mean": round(float(np.mean(run.steps.num_running)), 1),
        "wall_s": round(wall_s, 1),
    }


def _percentiles(values: NDArray[Any]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 2) for p in (50, 90, 99)}


def divide(machine: Machine, duration_s: float) -> dict[str, Any]:
    """Both flood, with weights 3 and 1; ``small`` has requests of another shape."""
    streams = [
        Stream(tenant="large", rate_per_s=200, num_prompt_tokens=800, num_output_tokens=200),
        Stream(tenant="small", rate_per_s=400, num_prompt_tokens=200, num_output_tokens=100),
    ]
    weights = {"large": 1.0, "small": 3.0}
    arrivals = [it for i, s in enumerate(streams) for it in s.arrivals(duration_s, seed=10 + i)]
    run = serve(machine, arrivals, "fair", weights)
    served = tokens_by_tenant(run, duration_s / 4, duration_s)
    part = served["small"] / sum(served.values())
    return {
        "weights": weights,
        "tokens": {name: round(num) for name, num in served.items()},
        "part_of_small": round(part, 4),
        "part_due": 0.75,
        "holds": bool(abs(part - 0.75) < _SHARE_ERROR_MAX),
    }


def main() -> int:
    """Run all, write the results, and say whether the promise holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=120, help="virtual time of each run")
    parser.add_argument("--output", type=Path, default=_RESULTS)
    args = parser.parse_args()
    studies: dict[str, Any] = {}
    for machine, shape, is_promised in _STUDIES:
        name = f"{machine.name}, flood of {shape[0]} + {shape[1]} tokens"
        studies[name] = isolate(machine, args.seconds, shape) | {"is_promised": is_promised}
    shares = {machine.name: divide(machine, args.seconds / 2) for machine in (SLOTS, BLOCKS)}
    result = {
        "command": "make fairness",
        "python": platform.python_version(),
        "time": "virtual",
        "cost": H200_8B.name,
        "promise": f"p99 to the first token rises by less than {_RISE_MAX:.0%} over a neighbour "
        "that keeps to its share",
        "isolation": studies,
        "shares": shares,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(shares, indent=2))
    holds = [study["holds"] for study in studies.values() if study["is_promised"]]
    holds += [study["holds"] for study in shares.values()]
    for name, study in studies.items():
        print(
            f"{name}: p99 {study['rise_of_p99_over_share']:+.1%} over a neighbour at its share, "
            f"{study['rise_of_p99_over_alone']:+.1%} over nobody; "
            f"{study['rise_of_p99_by_waiting']:+.1%} by waiting, the rest by longer steps"
        )
    return 0 if all(holds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
