"""Blocks saved by sharing, as the paper counts them: saved blocks over blocks without sharing.

Without sharing every sequence has blocks of its own for all its tokens. Both are summed over all
steps of a run, so a request counts for as long as it lives, as in a server (section 6.3).
"""

from dataclasses import asdict, dataclass, replace

import numpy as np

from bench.paper.ancestry import Parents
from bench.paper.beams import BeamServer
from bench.paper.cost_model import CostModel
from bench.paper.lengths import Lengths
from bench.paper.paged import PagedConfig, PagedServer
from bench.paper.run_log import UsageTable
from bench.paper.workload import backlog

# Room for everybody, so that nobody is thrown out and computed twice; the metric is a ratio, and
# large batches take fewer steps.
_KV_MEMORY_FACTOR = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """What sharing saves and costs in one run.

    Attributes:
        data: Name of the lengths.
        num_sequences: Samples or beams of a request.
        saved_share: Saved blocks over blocks without sharing.
        num_copies_per_step: Copied blocks per step of one request.
        num_forks_per_step: Forks per step of one request, where they were counted.
        num_blocks_per_request: Blocks that one request holds on average while it runs.
        num_tokens_per_request: Tokens, each counted for every sequence that has it, likewise.
    """

    data: str
    num_sequences: int
    saved_share: float
    num_copies_per_step: float
    num_forks_per_step: float
    num_blocks_per_request: float
    num_tokens_per_request: float

    def to_json(self) -> dict[str, object]:
        """For the results file."""
        return asdict(self)


def sharing_of(data: str, num_sequences: int, usage: UsageTable) -> Sharing:
    """Summarise a run in which every request has ``num_sequences``."""
    totals = {name: float(column.sum()) for name, column in usage.columns.items()}
    # While it is prefilled, a request has one sequence; it counts as a part of a request then.
    num_request_steps = totals["num_running"] / num_sequences
    return Sharing(
        data=data,
        num_sequences=num_sequences,
        saved_share=1 - totals["num_blocks"] / totals["num_blocks_unshared"],
        num_copies_per_step=totals["num_copies"] / num_request_steps,
        num_forks_per_step=totals["num_forks"] / num_request_steps,
        num_blocks_per_request=totals["num_blocks"] / num_request_steps,
        num_tokens_per_request=totals["num_token_slots"] / num_request_steps,
    )


def measure_parallel(
    lengths: Lengths, cost: CostModel, *, num_samples: int, num_requests: int, seed: int
) -> Sharing:
    """Parallel sampling through scheduler and engine, in a memory where nobody waits for blocks."""
    roomy = replace(cost, kv_memory_bytes=_KV_MEMORY_FACTOR * cost.kv_memory_bytes)
    workload = backlog(lengths, num_requests=num_requests, seed=seed, num_samples=num_samples)
    run = PagedServer(PagedConfig(), roomy, seed=seed).serve(workload)
    assert not run.num_preemptions, f"{run.num_preemptions} preemptions with room for all"
    return sharing_of(lengths.name, num_samples, run.usage)


def measure_beams(
    lengths: Lengths,
    cost: CostModel,
    recording: Parents,
    *,
    num_requests: int,
    seed: int,
    block_size: int = 16,
) -> Sharing:
    """Beam search through the engine, with recorded ancestry; its width is the recording's."""
    server = BeamServer(recording, cost, block_size=block_size, seed=seed)
    usage = server.serve(lengths.spread(num_requests, np.random.default_rng([seed, 0])))
    return sharing_of(lengths.name, recording.shape[2], usage)
