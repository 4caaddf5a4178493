"""Requests with lengths and times of arrival."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.paper.lengths import Lengths

_NS = 1e9


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival.

    Attributes:
        lengths: Of each request, [N].
        arrival_ns: int64 [N], ascending.
        num_samples: Outputs of each request.
    """

    lengths: Lengths
    arrival_ns: NDArray[np.int64]
    num_samples: int = 1

    def __len__(self) -> int:
        return len(self.arrival_ns)

    @property
    def end_ns(self) -> int:
        """When the last request comes."""
        return int(self.arrival_ns[-1])


def backlog(lengths: Lengths, *, num_requests: int, seed: int, num_samples: int = 1) -> Workload:
    """Requests that have all come before the first step: memory is the limit, not the rate.

    They are an even sample of ``lengths``.
    """
    order = np.random.default_rng([seed, 0])
    arrival_ns = np.zeros(num_requests, dtype=np.int64)
    return Workload(lengths.spread(num_requests, order), arrival_ns, num_samples)


def poisson(
    lengths: Lengths, *, rate_per_s: float, duration_s: float, seed: int, num_samples: int = 1
) -> Workload:
    """Requests that come independently of each other, as in the paper (section 6.1).

    The same seed gives the same order of requests and the same pattern of gaps at every rate,
    faster or slower, so curves over the rate compare like with like.
    """
    num_requests = round(rate_per_s * duration_s)
    order = np.random.default_rng([seed, 0])
    gaps = np.random.default_rng([seed, 1]).exponential(1 / rate_per_s, num_requests)
    arrival_ns = (np.cumsum(gaps) * _NS).astype(np.int64)
    return Workload(lengths.sample(num_requests, order), arrival_ns, num_samples)
