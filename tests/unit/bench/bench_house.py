"""Small servers and workloads for the tests of the paper's tables."""

import numpy as np

from bench.paper.cost_model import CostModel
from bench.paper.lengths import Lengths
from bench.paper.workload import Workload


def make_cost(num_slots: int) -> CostModel:
    """Steps of 1,000 ns, 10 ns per token, 2 ns per token of context."""
    return CostModel(
        name="tiny",
        num_parameters=10,
        weight_bytes=500,
        kv_bytes_per_token=1,
        kv_memory_bytes=num_slots,
        bandwidth_bytes_per_s=5e8,
        flops_per_s=2e9,
        host_ns=0.0,
    )


def make_lengths(*pairs: tuple[int, int]) -> Lengths:
    columns = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return Lengths("made up", columns[:, 0], columns[:, 1])


def make_workload(
    pairs: list[tuple[int, int]], arrival_ns: list[int], num_samples: int = 1
) -> Workload:
    return Workload(make_lengths(*pairs), np.array(arrival_ns, dtype=np.int64), num_samples)
