"""Two sweeps: over block sizes, and over beam widths. What sharing saves, against what it copies.

A server whose memory is full runs as many groups of beams as fit. With sharing more of them fit,
and each step copies some blocks before it writes:

    groups    G = pool / blocks of a group
    step      t = cost of the batch of G groups
    speed     G / (t + copies)

Sharing is worth its copies as long as its speed is above that without sharing, which is given its
forks for nothing here; in truth it would copy the whole history of a beam for each, and what that
would cost is told beside. Where both speeds are equal, the time for copies breaks even. Groups are
not rounded to whole ones.
"""

from dataclasses import asdict, dataclass

from bench.paper.ancestry import Parents
from bench.paper.cost_model import CostModel
from bench.paper.lengths import Lengths
from bench.paper.paged import PagedConfig, PagedServer
from bench.paper.sharing import Sharing, measure_beams
from bench.paper.workload import poisson

_TABLE_ENTRY_BYTES = 4
_RATE_PER_S = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """A full server with sharing beside one without.

    Attributes:
        num_groups_shared: Beam groups that fit with sharing.
        num_groups_unshared: Beam groups that fit without.
        copy_ns: What the copies of a step cost.
        break_even_copy_ns: What they may cost before sharing gains nothing.
        history_copy_ns: What the forks of a step would cost without sharing.
        speedup: Steps of groups per second with sharing, over those without.
    """

    num_groups_shared: float
    num_groups_unshared: float
    copy_ns: float
    break_even_copy_ns: float
    history_copy_ns: float
    speedup: float


def balance(sharing: Sharing, cost: CostModel, block_size: int) -> Balance:
    """Weigh what sharing saves in memory against what it copies."""
    num_blocks = cost.num_slots / block_size
    shared = num_blocks / sharing.num_blocks_per_request
    unshared = num_blocks * (1 - sharing.saved_share) / sharing.num_blocks_per_request

    def step_ns(num_groups: float) -> float:
        return cost.of_step(
            num_groups * sharing.num_sequences, num_groups * sharing.num_tokens_per_request
        )

    copy_ns = cost.copy_ns(shared * sharing.num_copies_per_step * block_size)
    return Balance(
        num_groups_shared=shared,
        num_groups_unshared=unshared,
        copy_ns=copy_ns,
        history_copy_ns=cost.copy_ns(
            unshared
            * sharing.num_forks_per_step
            * sharing.num_tokens_per_request
            / sharing.num_sequences
        ),
        break_even_copy_ns=step_ns(unshared) * shared / unshared - step_ns(shared),
        speedup=shared / (step_ns(shared) + copy_ns) * step_ns(unshared) / unshared,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSizePoint:
    """One block size.

    Attributes:
        block_size: Tokens per block.
        wasted_share: Of the slots given out in basic sampling, what holds no token.
        table_bytes: Block tables of all running sequences, in basic sampling.
        sharing: Beam search of one width.
        balance: The same, weighed.
    """

    block_size: int
    wasted_share: float
    table_bytes: float
    sharing: Sharing
    balance: Balance

    def to_json(self) -> dict[str, object]:
        """For the results file."""
        return asdict(self)


def measure_block_size(
    block_size: int,
    lengths: Lengths,
    cost: CostModel,
    recording: Parents,
    *,
    duration_s: float,
    num_beam_requests: int,
    seed: int,
) -> BlockSizePoint:
    """Basic sampling through the whole system, and beam search, with blocks of one size."""
    workload = poisson(lengths, rate_per_s=_RATE_PER_S, duration_s=duration_s, seed=seed)
    usage = PagedServer(PagedConfig(block_size=block_size), cost, seed=seed).serve(workload).usage
    sharing = measure_beams(
        lengths,
        cost,
        recording,
        num_requests=num_beam_requests,
        seed=seed,
        block_size=block_size,
    )
    return BlockSizePoint(
        block_size=block_size,
        wasted_share=usage.mean("num_unused_slots") / usage.mean("num_held_slots"),
        table_bytes=usage.mean("num_blocks_unshared") * _TABLE_ENTRY_BYTES,
        sharing=sharing,
        balance=balance(sharing, cost, block_size),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamWidthPoint:
    """One beam width."""

    width: int
    sharing: Sharing
    balance: Balance

    def to_json(self) -> dict[str, object]:
        """For the results file."""
        return asdict(self)


def measure_beam_width(
    recording: Parents, lengths: Lengths, cost: CostModel, *, num_requests: int, seed: int
) -> BeamWidthPoint:
    """Beam search of the recording's width, with blocks of the default size."""
    sharing = measure_beams(lengths, cost, recording, num_requests=num_requests, seed=seed)
    return BeamWidthPoint(
        width=recording.shape[2],
        sharing=sharing,
        balance=balance(sharing, cost, PagedConfig().block_size),
    )
