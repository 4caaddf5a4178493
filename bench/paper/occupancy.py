"""How much of KV memory holds tokens, and how many requests fit into a batch at equal memory."""

from dataclasses import asdict, dataclass

from bench.paper.cost_model import CostModel
from bench.paper.lengths import Lengths
from bench.paper.run_log import Run, UsageTable
from bench.paper.systems import SYSTEMS
from bench.paper.workload import backlog, poisson

# The first requests join all at once, with nothing but prompts; the last leave an empty server.
_WARM_UP = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """Means over the steps of a run, as figures 2 and 13 of the paper have them.

    Attributes:
        system: Who.
        num_running: Sequences in the batch.
        token_share: Of all of KV memory, what holds tokens.
        future_share: What is reserved and will hold one.
        unused_share: What is reserved or given out and never will.
        rest_share: What is lost to rounding or given to nobody.
        token_share_of_held: Of what is given out to requests, what holds tokens.
    """

    system: str
    num_running: float
    token_share: float
    future_share: float
    unused_share: float
    rest_share: float
    token_share_of_held: float

    def to_json(self) -> dict[str, object]:
        """For the results file."""
        return asdict(self)


def occupancy_of(system: str, usage: UsageTable, num_slots: int) -> Occupancy:
    """Summarise steps of a system with ``num_slots`` of KV memory."""
    tokens, future = usage.mean("num_token_slots"), usage.mean("num_future_slots")
    unused, held = usage.mean("num_unused_slots"), usage.mean("num_held_slots")
    return Occupancy(
        system=system,
        num_running=usage.mean("num_running"),
        token_share=tokens / num_slots,
        future_share=future / num_slots,
        unused_share=unused / num_slots,
        rest_share=1 - (tokens + future + unused) / num_slots,
        token_share_of_held=tokens / held,
    )


def full_steps(run: Run) -> UsageTable:
    """The steps of a backlog during which memory was the limit."""
    pressed = run.usage.under_pressure()
    assert pressed.num_steps, f"the backlog was too short for {run.system}: nobody waited"
    end_ns = float(pressed.columns["start_ns"][-1])
    return pressed.between(_WARM_UP * end_ns, end_ns)


def measure_occupancy(
    lengths: Lengths, cost: CostModel, *, num_requests: int, seed: int
) -> list[Occupancy]:
    """Every system with a backlog that keeps its memory full."""
    workload = backlog(lengths, num_requests=num_requests, seed=seed)
    return [
        occupancy_of(name, full_steps(serve(workload, cost)), cost.num_slots)
        for name, serve in SYSTEMS.items()
    ]


def measure_at_rate(
    lengths: Lengths, cost: CostModel, *, rate_per_s: float, duration_s: float, seed: int
) -> list[Occupancy]:
    """Every system while requests come at this rate."""
    workload = poisson(lengths, rate_per_s=rate_per_s, duration_s=duration_s, seed=seed)
    return [
        occupancy_of(name, serve(workload, cost).usage.between(0, workload.end_ns), cost.num_slots)
        for name, serve in SYSTEMS.items()
    ]
