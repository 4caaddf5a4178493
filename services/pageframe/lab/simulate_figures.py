"""What a simulated run was like for those who waited, in a few figures."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.lab.virtual import VirtualRun, has_succeeded

_LATE_SHARE_MAX = 0.01
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """When a request counts as served well.

    Attributes:
        ttft_s: Its first token came within this time, seconds.
        itl_s: Of its times between tokens, 99 % were no longer than this, seconds.
    """

    ttft_s: float = 2.0
    itl_s: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Percentiles of something, in seconds; 0 where there is nothing."""

    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: NDArray[np.float64]) -> "Spread":
        """Of the values themselves."""
        if not len(seconds):
            return cls(p50=0.0, p90=0.0, p99=0.0, max=0.0)
        p50, p90, p99 = np.percentile(seconds, PERCENTILES).tolist()
        return cls(p50=p50, p90=p90, p99=p99, max=float(seconds.max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run.

    Attributes:
        num_requests: That came.
        num_finished: Of which every sample got all its tokens.
        num_good: Of which every sample did so within the objectives.
        num_refused: Refused at once.
        num_failed: Ended by a deadline or an error.
        duration_s: Until the last token, seconds.
        goodput_per_s: Good requests per second.
        output_tokens_per_s: Sampled tokens per second.
        ttft_s: From arrival to a sample's first token.
        itl_s: From one token of a sample to the next.
        latency_s: From arrival to the last token.
        num_preemptions: How often a sequence lost blocks.
        recomputed_share: Of the prompt and output tokens that were computed, those computed again.
        cached_share: Of all prompt tokens, those found in the prefix index.
        mean_blocks_share: Blocks held, over time.
        peak_blocks_share: Most blocks held at once.
        num_steps: Steps that ran.
        mean_running: Sequences in a step.
    """

    num_requests: int
    num_finished: int
    num_good: int
    num_refused: int
    num_failed: int
    duration_s: float
    goodput_per_s: float
    output_tokens_per_s: float
    ttft_s: Spread
    itl_s: Spread
    latency_s: Spread
    num_preemptions: int
    recomputed_share: float
    cached_share: float
    mean_blocks_share: float
    peak_blocks_share: float
    num_steps: int
    mean_running: float

    def to_json(self) -> dict[str, Any]:
        """Plain numbers by name."""
        return asdict(self)


def figures_of(run: VirtualRun, objectives: Objectives) -> Figures:
    """Work out the figures of a run."""
    ids, times = run.token_times()
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    places = np.array([run.request_of[i] for i in ids[starts].tolist()], dtype=np.int64)
    arrival_ns = np.array([it.arrival_s for it in run.arrivals]) * NANOSECONDS_PER_SECOND
    ttft_s = (times[starts] - arrival_ns[places]) / NANOSECONDS_PER_SECOND
    gaps_s = np.delete(np.diff(times, prepend=0), starts) / NANOSECONDS_PER_SECOND
    late = _is_late(times, starts, objectives)
    num_late = np.add.reduceat(late, starts) if len(starts) else late
    num_gaps = np.diff(np.append(starts, len(ids))) - 1
    is_good = (ttft_s <= objectives.ttft_s) & (num_late <= _LATE_SHARE_MAX * num_gaps)

    num_requests = len(run.arrivals)
    num_samples = np.array([it.num_samples for it in run.arrivals], dtype=np.int64)
    done = [(place, ns) for (place, it), ns in zip(run.completions, run.end_ns, strict=True)
            if has_succeeded(it)]  # fmt: skip
    num_done = np.bincount([place for place, _ in done], minlength=num_requests)
    finished = num_done == num_samples
    num_good = np.bincount(places[is_good], minlength=num_requests)
    latency_s = np.array(
        [(ns - arrival_ns[place]) / NANOSECONDS_PER_SECOND for place, ns in done], dtype=np.float64
    )
    ended = {place for place, _ in run.completions}
    good = int(np.count_nonzero(finished & (num_good == num_samples)))
    duration_s = run.duration_s or 1.0
    return Figures(
        num_requests=num_requests,
        num_finished=int(np.count_nonzero(finished)),
        num_good=good,
        num_refused=run.refused.total(),
        num_failed=len(ended) - int(np.count_nonzero(finished)),
        duration_s=run.duration_s,
        goodput_per_s=good / duration_s,
        output_tokens_per_s=len(ids) / duration_s,
        ttft_s=Spread.of(ttft_s),
        itl_s=Spread.of(gaps_s),
        latency_s=Spread.of(latency_s),
        num_preemptions=run.num_preemptions,
        num_steps=len(run.steps.end_ns),
        **_memory_figures(run),
    )


def _is_late(
    times: NDArray[np.int64], starts: NDArray[np.int64], objectives: Objectives
) -> NDArray[np.int64]:
    """For each token whether it kept somebody waiting too long; first tokens are no gaps."""
    gaps = np.diff(times, prepend=0)
    gaps[starts] = 0
    late: NDArray[np.int64] = (gaps > objectives.itl_s * NANOSECONDS_PER_SECOND).astype(np.int64)
    return late


def _memory_figures(run: VirtualRun) -> dict[str, float]:
    steps = run.steps
    held = np.frombuffer(steps.num_held, dtype=np.int64)
    ends = np.frombuffer(steps.end_ns, dtype=np.int64)
    computed = int(np.frombuffer(steps.num_computed, dtype=np.int64).sum())
    running = np.frombuffer(steps.num_running, dtype=np.int64)
    num_prompt = num_cached = num_needed = 0
    for _, completion in run.completions:
        num_prompt += completion.num_prompt_tokens
        num_cached += completion.num_cached_tokens
        # The last output token is never computed; siblings share the prompt of sample 0.
        num_needed += max(0, completion.num_output_tokens - 1)
        if completion.sample_index == 0:
            num_needed += completion.num_prompt_tokens - completion.num_cached_tokens
    lasted = np.diff(ends, prepend=0)
    mean_held = float((held * lasted).sum() / lasted.sum()) if len(ends) else 0.0
    return {
        "recomputed_share": max(0, computed - num_needed) / computed if computed else 0.0,
        "cached_share": num_cached / num_prompt if num_prompt else 0.0,
        "mean_blocks_share": mean_held / run.num_blocks,
        "peak_blocks_share": float(held.max()) / run.num_blocks if len(held) else 0.0,
        "mean_running": float(running.mean()) if len(running) else 0.0,
    }
